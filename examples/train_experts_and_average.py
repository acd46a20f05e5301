"""Train experts, deploy one network: ``python train_experts_and_average.py``. Needs the data and compression extras.

Two feed-forward networks of a vision transformer are trained as four experts each, which every step draws together, and
then folded into one: what is deployed is the architecture that you had.
"""

import torch
from timm.models.vision_transformer import VisionTransformer

import retensor as rt
from retensor.compression import ewa
from retensor.data import accuracy, digits, fit

STEPS = 400
data = digits()
torch.manual_seed(0)
before = VisionTransformer(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=32, depth=4, num_heads=4)

model = ewa.convert(before, num_experts=4, layers="every2")
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
ewa.attach(optimizer, model, share_rate=0.3, total_steps=STEPS)  # the training loop needs no other change
fit(model, data.x, data.y, steps=STEPS, optimizer=optimizer)
for layer in ewa.stats(model):
    print(f"{layer.name}: experts differ by {max(layer.spread):.3f} of their mean, {layer.tokens} tokens each")

after = ewa.fold(model)
same = {name: v.shape for name, v in after.state_dict().items()} == {n: v.shape for n, v in before.state_dict().items()}
print("the folded model has the original names and shapes" if same else "the folded model is another one")

both = rt.compare(
    before,
    after,
    inputs=(1, 1, 8, 8),
    accelerator="ethos-u65-256",
    names=["untrained", "trained and folded"],
    accuracy={
        "untrained": accuracy(before, data.x_test, data.y_test),
        "trained and folded": accuracy(after, data.x_test, data.y_test),
    },
)
print(both)
