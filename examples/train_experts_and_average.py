"""Train experts, deploy one network: ``python train_experts_and_average.py``. Needs the data and compression extras.

Two feed-forward networks of a vision transformer are trained as four experts each, which every step draws together, and
then folded into one: what is deployed is the architecture that you had. It is compared with plain training as long.
"""

import copy

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import retensor as rt
from retensor.compression import ewa
from retensor.data import accuracy, digits, fit

STEPS = 300
data = digits()
torch.manual_seed(0)
untrained = VisionTransformer(
    img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=32, depth=4, num_heads=4, weight_init="jax"
)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The same for both trainings."""
    return torch.optim.AdamW(model.parameters(), lr=8e-3, weight_decay=0.05)


plain = copy.deepcopy(untrained)
fit(plain, data.x, data.y, steps=STEPS, optimizer=adamw(plain))

model = ewa.convert(untrained, num_experts=4, layers="every2")
optimizer = adamw(model)
ewa.attach(optimizer, model, share_rate=0.3, total_steps=STEPS)  # the training loop needs no other change
fit(model, data.x, data.y, steps=STEPS, optimizer=optimizer)
for layer in ewa.stats(model):
    print(f"{layer.name}: experts differ by {max(layer.spread):.0e} of their mean, {layer.tokens} tokens each")

folded = ewa.fold(model)
shapes = [{name: v.shape for name, v in one.state_dict().items()} for one in (plain, folded)]
print("the folded model has the original names and shapes" if shapes[0] == shapes[1] else "the folded model is another")

both = rt.compare(
    plain,
    folded,
    inputs=(1, 1, 8, 8),
    accelerator="ethos-u65-256",
    names=["trained as it is", "trained as experts"],
    accuracy={
        "trained as it is": accuracy(plain, data.x_test, data.y_test),
        "trained as experts": accuracy(folded, data.x_test, data.y_test),
    },
)
print(both)
