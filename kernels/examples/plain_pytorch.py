"""FlashMHF in a model of plain PyTorch: fits a random map, on a GPU where there is one."""

import torch
from mhf_kernels import FlashMHF

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
ffn = FlashMHF(d_model=128, num_heads=2, num_subnetworks=4, d_e=64, device=device)
optimizer = torch.optim.AdamW(ffn.parameters(), lr=3e-3)
x = torch.randn(4, 64, 128, device=device)
target = torch.tanh(x @ torch.randn(128, 128, device=device) / 128**0.5)
for step in range(51):
    loss = (x + ffn(x) - target).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 25 == 0:
        print(f"step {step}: loss {loss.item():.4f}")
