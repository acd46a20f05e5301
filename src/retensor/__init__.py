"""retensor: put another tensor in the place of one a network has, and price it on a real accelerator."""
