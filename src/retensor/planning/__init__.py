"""Where tensors live: bounds, the exact planner, baselines, verifier and executor."""
