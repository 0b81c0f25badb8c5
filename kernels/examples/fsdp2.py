"""FlashMHF under FSDP2, as in torchtitan: torchrun --nproc-per-node 2 fsdp2.py."""

import torch
import torch.distributed as dist
from mhf_kernels import FlashMHF
from torch import nn
from torch.distributed.fsdp import fully_shard

device = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group()
if device == "cuda":
    torch.cuda.set_device(dist.get_node_local_rank())
torch.manual_seed(0)
model = nn.Sequential(*(FlashMHF(128, 2, 4, 64) for _ in range(4))).to(device)
for layer in model:
    fully_shard(layer)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
x = torch.randn(4, 64, 128, device=device) + dist.get_rank()
for step in range(11):
    loss = (model(x) - 1).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 0 and dist.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.4f}")
dist.destroy_process_group()
