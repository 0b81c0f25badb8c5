"""FlashMHF in a Hugging Face Llama, trained by Trainer, saved and loaded: python hf_trainer.py OUT."""

import sys

import torch
from mhf_kernels import replace_ffn
from safetensors.torch import load_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
model = AutoModelForCausalLM.from_config(config)
replace_ffn(model, d_h=32, d_e=64)  # parameters matched; the settings are kept in model.config.flash_mhf
tokens = (torch.arange(32) + torch.randint(256, (64, 1))) % 256  # each row counts upwards
data = [{"input_ids": row, "labels": row} for row in tokens]
arguments = TrainingArguments(sys.argv[1], max_steps=30, learning_rate=3e-3, report_to=[], logging_steps=10)
Trainer(model, arguments, train_dataset=data).train()
model.save_pretrained(sys.argv[1])

loaded = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1]))
replace_ffn(loaded, **loaded.config.flash_mhf)
load_model(loaded, f"{sys.argv[1]}/model.safetensors")
with torch.no_grad():
    difference = (loaded(tokens).logits - model.cpu()(tokens).logits).abs().max()
print(f"largest difference of the logits after loading: {difference:.1e}")
