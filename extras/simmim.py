"""SimMIM (Xie et al., arXiv 2111.09886) by pretrain.py's loop, with all of its flags.

    python extras/simmim.py --demo --mask-ratio 0.6 --no-norm-pix-loss --output-dir runs/simmim

The encoder sees all patches, the removed ones as a mask token. One linear layer predicts their
pixels; the loss is L1. finetune.py and linprobe.py take its checkpoints. Last line: pretrain.py's.
"""
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import models_mae
import pretrain


class SimMIM(models_mae.MaskedAutoencoderViT):
    def __init__(self, **settings):
        width = settings.get("embed_dim", 768)
        super().__init__(**(settings | dict(decoder_embed_dim=width, decoder_depth=0)))
        self.decoder_embed = nn.Identity()
        self.decoder_norm = nn.Identity()

    def flops_per_image(self, resolution, mask_ratio, decoder_keep=1.0, **changed):
        tokens = 1 + (resolution // self.patch_size) ** 2  # all, at any mask ratio
        decoder_embed = 6 * tokens * self.settings["embed_dim"] ** 2  # which MAE has, not SimMIM
        return super().flops_per_image(resolution, 0.0, **changed) - decoder_embed

    def encode(self, imgs, ids_keep):
        B = len(imgs)
        proj = self.patch_embed["proj"]
        x = F.conv2d(imgs, proj.weight, proj.bias, self.patch_size).flatten(2).mT  # (B, L, D)
        removed = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        removed = removed.scatter(1, ids_keep, False)  # (B, L)
        x = torch.where(removed[..., None], self.mask_token.to(x.dtype), x)
        pos = resample_abs_pos_embed(self.pos_embed, list(self.grid_of(imgs)))
        x = torch.cat([self.cls_token.expand(B, -1, -1).to(x.dtype), x], dim=1) + pos
        return self.norm(self.run_blocks(self.blocks, x))  # (B, 1 + L, D)

    def decode(self, latent, ids, L, grid):
        return self.decoder_pred(latent[:, 1:])  # (B, L, P), in order

    def forward_loss(self, imgs, pred, mask):
        target, _, _ = self.normalized_targets(imgs)
        return ((pred.float() - target).abs().mean(dim=-1) * mask).sum() / mask.sum()


if __name__ == "__main__":
    pretrain.MODEL = SimMIM
    pretrain.run(sys.argv[1:])
