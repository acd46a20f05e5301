"""A network of any width out of one object: ``python sample_any_width.py``. Needs the compression and data extras.

The inner width of a digit classifier's residual block becomes a choice. Fit once; then ask for the widths that your
devices have room for. What comes out is a plain network.
"""

import torch
from torch.utils.data import DataLoader

import retensor as rt
from retensor.compression import neumeta

model, digits = rt.data.reference("digits-cnn-plain")
space = neumeta.fuse_and_smooth(model, layers=["block"], example=digits.x[:2])
print(f"channels reordered: total variation {space.variation[0]:.0f} -> {space.variation[1]:.0f}")

family = neumeta.NeuMeta(space, hidden=96, depth=3, freqs=8)
neumeta.warm_start(family, steps=400, widths=range(8, 33))
loader = DataLoader(digits.train_set(), batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(0))
neumeta.fit(family, loader, widths=range(8, 33), recon=10.0, steps=500, lr=3e-4, milestones=(), ema=0.98)
family.save("family.safetensors")

quarter = family.sample(params=0.25, k=20)
print(f"a quarter of the block's parameters: width {quarter.block.conv1.out_channels}")

networks = {"the network itself": model, "block bypassed": family.bypassed()}
networks |= {f"width {width}": family.sample(width, k=20) for width in (32, 16, 8)}
print(
    rt.compare(
        *networks.values(),
        inputs=(1, 1, 8, 8),
        accelerator="16KiB",
        names=list(networks),
        accuracy=[rt.data.accuracy(network, digits.x_test, digits.y_test) for network in networks.values()],
    )
)
