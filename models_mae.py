"""The masked autoencoder, the ViT it becomes, and their weights.

    mae = models_mae.load_mae("runs/pretrain/last.pt")  # ours, official MAE's or Hugging Face's
    python models_mae.py --export-timm runs/pretrain/last.pt encoder.pt --num-classes 0
    python models_mae.py --export-hf runs/pretrain/last.pt vit_mae  # a folder for from_pretrained

MAE (He et al., arXiv 2111.06377) with the official names, so that official checkpoints load both
ways. Needs torch and timm. Shapes: B images, L patches, K kept, D width, P = p * p * 3 pixel values
of a patch. Last line: `encoder.pt: 150 tensors, for timm.create_model(..., global_pool='token')`,
or `vit_mae: 334 tensors, for transformers.ViTMAEForPreTraining.from_pretrained('vit_mae')`.
"""
import argparse
import json
import math
import os
import re
import shutil
import warnings
from functools import partial
from pathlib import Path

import numpy as np  # timm brings it, and safetensors
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed, trunc_normal_
from timm.models.vision_transformer import Block, VisionTransformer
from torch.utils.checkpoint import checkpoint


class WeightsError(ValueError):
    """A checkpoint, a size or a mask ratio that does not fit, and what to do."""


# --- what is masked and what is predicted: replace these two functions to try something else
def masking_noise(shape, generator=None, device=None, progress=0.0):
    """shape (..., L) -> random numbers, patches row by row: the smallest K stay visible.

    progress: how much of the run is done, 0 to 1. Training and pictures call it with the same.
    """
    return torch.rand(shape, generator=generator, device=device)


def targets(model, imgs, progress):
    """Normalised float (B, 3, H, W) -> what is predicted of each patch, (B, L, T).

    T is free: the decoder's last layer follows it. The loss normalises each patch's T numbers,
    unless with --no-norm-pix-loss. progress: a tensor (), 0 to 1, how much of the run is done.
    """
    return model.patchify(imgs)


TARGETS_ARE_PIXELS = True  # False where targets() gives features, of which no pictures are made


# --- counting
def count_patches(size, patch_size):
    """Patches along a side of `size` pixels. Raises WeightsError where they are not whole."""
    if size < patch_size or size % patch_size:
        raise WeightsError(f"{size} pixels are not whole patches: give a multiple of {patch_size}.")
    return size // patch_size


def checked_grid(grid, num_patches):
    """Rows and columns of patches; None stands for a square. WeightsError if they do not fit."""
    if grid is None:
        grid = (math.isqrt(num_patches), math.isqrt(num_patches))
    h, w = grid
    if h * w != num_patches:
        raise WeightsError(f"{num_patches} patches are not {h} rows of {w}: give grid=(rows, "
                           "columns), such as grid_of(imgs).")
    return h, w


def num_kept(num_patches, mask_ratio):
    """Visible patches: int(L * (1 - m)), safe against float error: 100 at 0.9 keep 10."""
    if not 0 <= mask_ratio < 1:
        raise WeightsError(f"mask ratio {mask_ratio}: expected at least 0 and below 1.")
    return int(round(num_patches * (1 - mask_ratio), 6))


def num_decoded(num_patches, kept, decoder_keep):
    """Removed patches that the decoder reconstructs: a share of them, at least one."""
    return max(min(1, num_patches - kept), round((num_patches - kept) * decoder_keep))


def flops_per_image(resolution, mask_ratio, decoder_keep=1.0, patch_size=16, embed_dim=768,
                    depth=12, decoder_embed_dim=512, decoder_depth=8, mlp_ratio=4.0,
                    target_dim=None, **_):
    """FLOPs to train on one masked picture with a model's `settings`; a multiply-add is 2.

    Backward is twice forward, once for the patch embedding; recomputing is not counted.
    """
    patches = (resolution // patch_size) ** 2
    pixels = 3 * patch_size ** 2
    kept = num_kept(patches, mask_ratio)
    decoded = num_decoded(patches, kept, decoder_keep)

    def blocks(tokens, width, depth):
        return depth * ((4 + 2 * mlp_ratio) * tokens * width ** 2 + 2 * tokens ** 2 * width)
    forward = blocks(1 + kept, embed_dim, depth)
    forward += (1 + kept) * embed_dim * decoder_embed_dim
    forward += blocks(1 + kept + decoded, decoder_embed_dim, decoder_depth)
    forward += (kept + decoded) * decoder_embed_dim * (target_dim or pixels)
    return 2 * (3 * forward + 2 * kept * pixels * embed_dim)


def sincos_table(dim, grid):
    """(1, 1 + grid * grid, dim): zeros for the class token; then column half, row half."""
    omega = 1 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, dim / 2)
    table = torch.cat([axis.repeat(grid, 1), axis.repeat_interleave(grid, dim=0)], dim=1)
    return F.pad(table, (0, 0, 1, 0))[None].float()


# --- common to both models
IMAGENET_MEAN = [0.485, 0.456, 0.406]  # of red, green and blue, where white is 1
IMAGENET_STD = [0.229, 0.224, 0.225]


def set_normalization(model, mean, std):
    """Mean and deviation of three colours as buffers that no checkpoint holds: settings do."""
    if not (max(*mean, *std) <= 1 and min(mean) >= 0 and min(std) > 0):
        raise WeightsError(f"mean {mean} and deviation {std} of red, green and blue: give numbers "
                           "from 0 to 1, where white is 1 (those of 0 to 255, divided by 255).")
    for name, rgb in (("mean", mean), ("std", std)):
        model.register_buffer(name, torch.tensor(rgb).view(1, 3, 1, 1), persistent=False)


def init_weights(model):
    """MAE's initial weights."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.patch_embed.proj.weight.flatten(1))
    nn.init.zeros_(model.patch_embed.proj.bias)
    nn.init.normal_(model.cls_token, std=0.02)


def warn_of_range(imgs):
    """Warns of float pictures of 0 to 1, or 0 to 255. On a GPU it waits for them."""
    if torch.compiler.is_compiling() or imgs.device.type == "meta" or imgs.numel() == 0:
        return
    low, high = imgs.detach().aminmax()
    if low >= 0 and (high <= 1 or high > 20):  # Python shows the warning once
        warnings.warn("float pictures of 0 to 1, or 0 to 255, are not normalised, as float "
                      "pictures must be: give uint8, or subtract the model's mean and divide by "
                      "its std.")


def normalize(model, imgs):
    """uint8 (B, 3, H, W) -> float, of the model's mean and deviation; float stays as it is."""
    if not imgs.is_floating_point():
        return (imgs.float() / 255 - model.mean) / model.std
    in_training_step = model.training and torch.is_grad_enabled()
    if not in_training_step:  # which must not wait for the GPU
        warn_of_range(imgs)
    return imgs


@torch.no_grad()
def accuracy(batches, device):
    """Batches of scores (B, C) and labels (B,) of all ranks -> {top1, top5, n}.

    top1 and top5 are in percent, top5 only where there are six classes or more; n is the number of
    pictures.
    """
    counts = torch.zeros(3, dtype=torch.float64, device=device)  # top-1 hits, top-5 hits, n
    for scores, labels in batches:
        num_classes = scores.shape[1]
        hits = scores.topk(min(5, num_classes)).indices == labels[:, None]  # (B, 5)
        counts[0] += hits[:, 0].sum()
        counts[1] += hits.sum()
        counts[2] += len(labels)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(counts)
    top1_hits, top5_hits, n = counts.tolist()
    result = {"top1": 100 * top1_hits / n, "n": int(n)}
    if num_classes > 5:
        result["top5"] = 100 * top5_hits / n
    return result


# --- the masked autoencoder
class MaskedAutoencoderViT(nn.Module):
    """MAE: a ViT over the visible patches and a light decoder that predicts the others' pixels.

    Attributes: settings, the arguments, which are saved with the weights; recompute, whether
    activations are computed again in the backward pass (less memory, slower).
    """
    normalize = normalize  # the function above, as a method

    def __init__(self, img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12,
                 decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16, mlp_ratio=4.0,
                 norm_pix_loss=True, target_dim=None, mean=IMAGENET_MEAN, std=IMAGENET_STD,
                 predicts_pixels=None):
        super().__init__()
        # They are saved with the weights, whose shapes do not tell the head counts
        self.settings = dict(
            img_size=img_size, patch_size=patch_size, embed_dim=embed_dim, depth=depth,
            num_heads=num_heads, decoder_embed_dim=decoder_embed_dim, decoder_depth=decoder_depth,
            decoder_num_heads=decoder_num_heads, mlp_ratio=mlp_ratio, norm_pix_loss=norm_pix_loss,
            target_dim=target_dim, mean=list(mean), std=list(std), predicts_pixels=predicts_pixels)
        self.patch_size = patch_size
        self.norm_pix_loss = norm_pix_loss
        self.recompute = False
        self.active_decoder_blocks = decoder_depth  # a stage may use the first ones alone
        grid = count_patches(img_size, patch_size)
        # How much of a run is done: pretrain.py sets it. A tensor, so that nothing is recompiled
        self.register_buffer("progress", torch.zeros(()), persistent=False)
        set_normalization(self, mean, std)
        if target_dim is None:
            target_dim = self.find_target_dim()
        if target_dim == 1 and norm_pix_loss:
            raise WeightsError("targets() gives one number for a patch, which cannot be "
                               "normalised: add --no-norm-pix-loss (norm_pix_loss=False).")
        if predicts_pixels is None:  # a checkpoint tells it
            predicts_pixels = TARGETS_ARE_PIXELS and target_dim == patch_size ** 2 * 3
        self.predicts_pixels = predicts_pixels
        self.settings |= dict(target_dim=target_dim, predicts_pixels=predicts_pixels)
        norm_layer = partial(nn.LayerNorm, eps=1e-6)

        def make_blocks(width, heads, depth):
            return nn.ModuleList(Block(width, heads, mlp_ratio, True, norm_layer=norm_layer)
                                 for _ in range(depth))  # True: bias in qkv
        # The official name and shape; applied as one matrix product to the patches that are kept
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, embed_dim, patch_size, patch_size)})
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_table(embed_dim, grid), requires_grad=False)
        self.blocks = make_blocks(embed_dim, num_heads, depth)
        self.norm = norm_layer(embed_dim)

        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_table(decoder_embed_dim, grid),
                                              requires_grad=False)
        self.decoder_blocks = make_blocks(decoder_embed_dim, decoder_num_heads, decoder_depth)
        self.decoder_norm = norm_layer(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, target_dim)

        init_weights(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def find_target_dim(self):
        """T, by what targets() gives for a blank picture. WeightsError if it is not (B, L, T)."""
        size = self.settings["img_size"]
        found = targets(self, torch.zeros(1, 3, size, size), self.progress).shape
        L = (size // self.patch_size) ** 2
        if len(found) != 3 or found[1] != L:
            raise WeightsError(f"targets() gives {tuple(found)} for a picture of {L} patches: "
                               f"expected (1, {L}, T), T numbers for each patch.")
        return found[2]

    def patchify(self, imgs):
        """(B, 3, H, W) -> (B, L, P), each patch's pixels ordered (row, column, channel)."""
        p = self.patch_size
        h, w = self.grid_of(imgs)
        x = imgs.reshape(len(imgs), 3, h, p, w, p)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(-1, h * w, p * p * 3)

    def unpatchify(self, x, grid=None):
        """(B, L, P) -> (B, 3, H, W). grid: rows and columns of patches; None: a square picture."""
        p = self.patch_size
        h, w = checked_grid(grid, x.shape[1])
        x = x.reshape(-1, h, w, p, p, 3).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(-1, 3, h * p, w * p)

    def grid_of(self, imgs):
        """(B, 3, H, W) -> rows and columns of patches. Raises WeightsError if not whole ones."""
        height, width = imgs.shape[-2:]
        return count_patches(height, self.patch_size), count_patches(width, self.patch_size)

    def flops_per_image(self, resolution, mask_ratio, decoder_keep=1.0, **changed):
        """FLOPs to train on one masked picture. A model that computes something else has its own.

        changed: what differs from the settings, such as a stage's decoder_depth.
        """
        return flops_per_image(resolution, mask_ratio, decoder_keep, **(self.settings | changed))

    def shuffle_patches(self, imgs, noise=None):
        """The patches' numbers in the order of their noise, (B, L): the first ones are kept."""
        h, w = self.grid_of(imgs)
        if noise is None:
            noise = masking_noise((len(imgs), h * w), device=imgs.device)
        return noise.argsort(dim=1)

    def run_blocks(self, blocks, x):
        """x (B, N, D) through blocks -> (B, N, D)"""
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return x

    def encode(self, imgs, ids_keep):
        """Normalised (B, 3, H, W), the kept patches' numbers (B, K) -> latent (B, 1 + K, D)."""
        B = len(imgs)
        pos = resample_abs_pos_embed(self.pos_embed, list(self.grid_of(imgs)))  # (1, 1 + L, D)
        patches = torch.take_along_dim(self.patchify(imgs), ids_keep[..., None], dim=1)  # (B, K, P)
        proj = self.patch_embed.proj
        weight = proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, P), in patchify's order
        x = F.linear(patches, weight, proj.bias)  # (B, K, D)
        x = x + torch.take_along_dim(pos[:, 1:], ids_keep[..., None], dim=1)
        cls_token = (self.cls_token + pos[:, :1]).expand(B, -1, -1)
        x = torch.cat([cls_token.to(x.dtype), x], dim=1)  # (B, 1 + K, D)
        return self.norm(self.run_blocks(self.blocks, x))

    def decode(self, latent, ids, L, grid):
        """Predicts the targets of the kept patches and of the N removed ones that follow in ids.

        latent (B, 1 + K, D), ids: the numbers of these patches (B, K + N), of L in all, grid: rows
        and columns of patches -> (B, L, T), zeros where nothing is predicted.
        """
        B = len(latent)
        N = ids.shape[1] - (latent.shape[1] - 1)
        # Attention knows no order: the tokens stay shuffled, each with its own position
        positions = torch.cat([torch.zeros_like(ids[:, :1]), ids + 1], dim=1)  # (B, 1 + K + N)
        pos = resample_abs_pos_embed(self.decoder_pos_embed, list(checked_grid(grid, L)))
        x = self.decoder_embed(latent)  # (B, 1 + K, decoder D)
        mask_tokens = self.mask_token.to(x.dtype).expand(B, N, -1)
        x = torch.cat([x, mask_tokens], dim=1)  # (B, 1 + K + N, decoder D)
        x = x + torch.take_along_dim(pos, positions[..., None], dim=1)
        x = self.run_blocks(self.decoder_blocks[:self.active_decoder_blocks], x)
        pred = self.decoder_pred(self.decoder_norm(x[:, 1:]))  # (B, K + N, T)
        index = ids[..., None].expand(-1, -1, pred.shape[2])
        return pred.new_zeros(B, L, pred.shape[2]).scatter(1, index, pred)

    def forward_encoder(self, imgs, mask_ratio, noise=None):
        """The official method: imgs (B, 3, H, W) -> latent (B, 1 + K, D), mask, ids_restore (B, L).

        mask: 1 = removed. ids_restore: where each patch stands among those ordered by their noise.
        """
        imgs = self.normalize(imgs)
        ids_shuffle = self.shuffle_patches(imgs, noise)  # (B, L)
        K = num_kept(ids_shuffle.shape[1], mask_ratio)
        ids_restore = ids_shuffle.argsort(dim=1)
        return self.encode(imgs, ids_shuffle[:, :K]), (ids_restore >= K).to(imgs.dtype), ids_restore

    def forward_decoder(self, latent, ids_restore, decoder_keep=1.0, grid=None):
        """The official method: latent (B, 1 + K, D), ids_restore (B, L) -> predictions (B, L, T).

        grid: rows and columns of patches; None: a square picture. decoder_keep: see forward().
        """
        L = ids_restore.shape[1]
        K = latent.shape[1] - 1
        N = num_decoded(L, K, decoder_keep)
        return self.decode(latent, ids_restore.argsort(dim=1)[:, :K + N], L, grid)

    @torch.no_grad()
    def normalized_targets(self, imgs):
        """What targets() gives in float32, (B, L, T), normalised; each patch's mean, deviation.

        No gradient goes into a target.
        """
        if not imgs.is_floating_point():  # else they are normalised, and forward() has seen them
            imgs = self.normalize(imgs)
        imgs = imgs.to(torch.promote_types(imgs.dtype, torch.float32))
        target = targets(self, imgs, self.progress).to(imgs.dtype)  # (B, L, T)
        if target.shape[2] != self.settings["target_dim"]:
            raise WeightsError(f"targets() gives {target.shape[2]} numbers for a patch, but this "
                               f"model predicts {self.settings['target_dim']}: set targets in "
                               "models_mae as it was when the model was trained.")
        if not self.norm_pix_loss:
            return target, 0.0, 1.0
        var, mean = torch.var_mean(target, dim=-1, keepdim=True)  # (B, L, 1)
        std = (var + 1e-6) ** 0.5
        return (target - mean) / std, mean, std

    def forward_loss(self, imgs, pred, mask):
        """Mean square error over the patches with mask 1, in float32; a mask of zeros means all."""
        target, _, _ = self.normalized_targets(imgs)
        loss = (pred.to(target.dtype) - target).square().mean(dim=-1)  # (B, L)
        mask = torch.where(mask.any(), mask, torch.ones_like(mask)).to(loss.dtype)
        return (loss * mask).sum() / mask.sum()

    def forward(self, imgs, mask_ratio=0.75, noise=None, decoder_keep=1.0, return_latent=False):
        """imgs (B, 3, H, W), uint8 or normalised float -> loss, pred (B, L, T), mask (B, L).

        Height and width may be any multiples of the patch: the position tables are resampled.
        noise (B, L) fixes the mask. decoder_keep < 1 reconstructs that share of the removed
        patches, those of the next smallest noise (dual masking, VideoMAE V2, arXiv 2303.16727). The
        mask is 1 where a patch was removed and reconstructed; elsewhere predictions may be zeros.
        return_latent adds the latent (B, 1 + K, D), for a probe.
        """
        if self.training and imgs.is_floating_point():
            warn_of_range(imgs)
        imgs = self.normalize(imgs)
        ids_shuffle = self.shuffle_patches(imgs, noise)  # (B, L): kept, decoded, the others
        B, L = ids_shuffle.shape
        K = num_kept(L, mask_ratio)
        N = num_decoded(L, K, decoder_keep)
        latent = self.encode(imgs, ids_shuffle[:, :K])
        pred = self.decode(latent, ids_shuffle[:, :K + N], L, self.grid_of(imgs))
        mask = imgs.new_zeros(B, L).scatter(1, ids_shuffle[:, K:K + N], 1.0)
        loss = self.forward_loss(imgs, pred, mask)
        return (loss, pred, mask, latent) if return_latent else (loss, pred, mask)

    @torch.no_grad()
    def reconstruct(self, imgs, mask_ratio=0.75, noise=None, with_zero=False):
        """(B, 3, H, W) -> (3, B, 3, H, W) in [0, 1]: original, what is seen, reconstruction.

        A patch that was normalised for the loss gets back its own mean and deviation, which the
        model has not predicted. with_zero adds a fourth, the reconstruction if all predictions were
        0: what is better in the third was learned. WeightsError where the targets are no pixels.
        """
        if not self.predicts_pixels:
            raise WeightsError("this model predicts no pixels: there is nothing to show of it.")
        _, pred, mask = self(imgs, mask_ratio, noise)
        patches = self.patchify(self.normalize(imgs))
        _, mean, std = self.normalized_targets(imgs)
        zero = torch.zeros_like(pred).float() * std + mean
        pred = pred.float() * std + mean
        visible = patches * (1 - mask[..., None])
        rows = [patches, visible, visible + pred * mask[..., None]]
        if with_zero:
            rows.append(visible + zero * mask[..., None])
        count = len(rows)
        rows = torch.cat(rows)  # (3 B or 4 B, L, P)
        pixels = (self.unpatchify(rows, self.grid_of(imgs)) * self.std + self.mean).clamp(0, 1)
        return pixels.unflatten(0, (count, -1))

    def forward_whole(self, imgs):
        """Whole pictures (B, 3, H, W) -> the final tokens (B, 1 + L, D), in order, class first."""
        h, w = self.grid_of(imgs)
        in_order = torch.arange(h * w, device=imgs.device).expand(len(imgs), h * w)
        return self.encode(self.normalize(imgs), in_order)

    def tokens(self, imgs):
        """The final patch tokens of whole pictures as a map, (B, D, h, w), for dense tasks.

        Differentiable; for frozen features call it under torch.no_grad().
        """
        latent = self.forward_whole(imgs)
        return latent[:, 1:].mT.unflatten(2, self.grid_of(imgs))

    @torch.no_grad()
    def features(self, imgs):
        """Mean of the final patch tokens of whole pictures, (B, D)."""
        return self.forward_whole(imgs)[:, 1:].mean(dim=1)


# --- sizes: MAE's B, L and H. S and Ti are not in MAE; nano is for CPUs: the demo and the tests
VIT_B = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4.0,
             decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16)
SIZES = {
    "mae_vit_nano_patch8": VIT_B | dict(patch_size=8, embed_dim=128, depth=6, num_heads=4,
                                        decoder_embed_dim=96, decoder_depth=2,
                                        decoder_num_heads=4),
    "mae_vit_tiny_patch16": VIT_B | dict(embed_dim=192, num_heads=3, decoder_embed_dim=128,
                                         decoder_depth=4, decoder_num_heads=4),
    "mae_vit_small_patch16": VIT_B | dict(embed_dim=384, num_heads=6, decoder_embed_dim=256,
                                          decoder_num_heads=8),
    "mae_vit_base_patch16": VIT_B,
    "mae_vit_large_patch16": VIT_B | dict(embed_dim=1024, depth=24, num_heads=16),
    "mae_vit_huge_patch14": VIT_B | dict(patch_size=14, embed_dim=1280, depth=32, num_heads=16),
}
VIT_SIZES = tuple(name.removeprefix("mae_") for name in SIZES)
mae_vit_nano_patch8 = partial(MaskedAutoencoderViT, **SIZES["mae_vit_nano_patch8"])
mae_vit_tiny_patch16 = partial(MaskedAutoencoderViT, **SIZES["mae_vit_tiny_patch16"])
mae_vit_small_patch16 = partial(MaskedAutoencoderViT, **SIZES["mae_vit_small_patch16"])
mae_vit_base_patch16 = partial(MaskedAutoencoderViT, **SIZES["mae_vit_base_patch16"])
mae_vit_large_patch16 = partial(MaskedAutoencoderViT, **SIZES["mae_vit_large_patch16"])
mae_vit_huge_patch14 = partial(MaskedAutoencoderViT, **SIZES["mae_vit_huge_patch14"])


def vit_size(name):
    """The encoder's settings of a name in VIT_SIZES."""
    size = SIZES["mae_" + name]
    keys = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
    return {key: size[key] for key in keys}


# --- the ViT it becomes
class ViT(VisionTransformer):
    """timm's ViT with MAE's initialisation: uint8 or normalised (B, 3, H, W) -> (B, classes).

    classes 0 gives features (B, D). pool: "fc_norm", a new norm of the mean of the last block's
    patch tokens (finetuning); "mean" or "cls" after the pretrained norm (features). At another
    resolution than img_size each forward resamples the one table that all stages train.
    """
    normalize = normalize

    def __init__(self, settings, img_size=224, classes=1000, pool="fc_norm", drop_path=0.0):
        sizes = {k: v for k, v in settings.items() if k not in ("mean", "std")}
        super().__init__(img_size, num_classes=classes, fc_norm=pool == "fc_norm",
                         global_pool="token" if pool == "cls" else "avg", dynamic_img_size=True,
                         drop_path_rate=drop_path, norm_layer=partial(nn.LayerNorm, eps=1e-6),
                         **sizes)
        self.settings = settings | {"img_size": img_size}
        set_normalization(self, settings.get("mean", IMAGENET_MEAN),
                          settings.get("std", IMAGENET_STD))
        init_weights(self)
        grid = count_patches(img_size, settings["patch_size"])
        self.pos_embed.data.copy_(sincos_table(settings["embed_dim"], grid))
        if classes:
            trunc_normal_(self.head.weight, std=2e-5)

    def forward(self, imgs):
        return super().forward(self.normalize(imgs))


# --- weights in and out
def safe_classes():
    """What checkpoints may hold beside tensors: a command line's Namespace, NumPy's numbers."""
    scalar = np.float64(0).__reduce__()[0]  # the function that pickle rebuilds them with
    codes = np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?"
    dtypes = {type(np.dtype(code)) for code in codes}
    return [argparse.Namespace, (scalar, "numpy.core.multiarray.scalar"),  # NumPy 1 and 2
            (scalar, "numpy._core.multiarray.scalar"), np.dtype, *dtypes]


def read_file(path):
    """What torch.save or safetensors wrote. Raises WeightsError that says what the file is."""
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as e:
        raise WeightsError(f"{path} cannot be read: {e.strerror}.") from None
    if not head:
        raise WeightsError(f"{path} is empty: copy or download it again.")
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in "
                           "its folder, or download the file itself.")
    if head.lstrip().startswith(b"<"):
        raise WeightsError(f"{path} is a web page (HTML or XML), not the weights: download the "
                           "file itself, and look into this one for the reason.")
    is_safetensors = head[8:9] == b"{"
    if not is_safetensors and not head.startswith((b"PK", b"\x80")):  # a zip, or a bare pickle
        raise WeightsError(f"{path} is no checkpoint of PyTorch or safetensors: it begins with the "
                           f"bytes {head[:8]}. Copy it again, or give another file.")
    try:
        if is_safetensors:
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(safe_classes()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a damaged file can raise anything
        reason = str(e) or type(e).__name__
    if "TorchScript" in reason:
        raise WeightsError(f"{path} is a TorchScript program: save its weights by "
                           f"torch.save(torch.jit.load({str(path)!r}).state_dict(), FILE).")
    python_object = re.search(r"GLOBAL (\S+) was not an allowed", reason)
    if python_object:
        raise WeightsError(f"{path} holds Python objects ({python_object[1]}), not weights alone: "
                           "where it was made, save them by torch.save({'model': "
                           "model.state_dict()}, FILE).")
    if "weights_only" in reason:  # torch's advice, to read the file without any safety
        reason = "it holds what torch.save does not write"
    raise WeightsError(f"{path} is cut short, damaged or no checkpoint ({reason.splitlines()[0]}): "
                       "copy it again, or give another file.")


def check_finite(weights, path):
    """Raises WeightsError that names the first tensor with NaN or infinity in it."""
    for name, tensor in weights.items():
        if isinstance(tensor, torch.Tensor) and not tensor.isfinite().all():
            raise WeightsError(f"{path}: {name} holds NaN or infinity. The training that made it "
                               "diverged, or the file is damaged: give an earlier checkpoint.")


def hf_names(depth, decoder_depth):
    """Official names -> those in Hugging Face's files of ViTMAE: one, or q, k and v apart."""
    names = {"cls_token": ["vit.embeddings.cls_token"],
             "pos_embed": ["vit.embeddings.position_embeddings"],
             "mask_token": ["decoder.mask_token"],
             "decoder_pos_embed": ["decoder.decoder_pos_embed"]}
    modules = {"patch_embed.proj": ["vit.embeddings.patch_embeddings.projection"],
               "norm": ["vit.layernorm"], "head": ["classifier"],
               "decoder_embed": ["decoder.decoder_embed"],
               "decoder_norm": ["decoder.decoder_norm"],
               "decoder_pred": ["decoder.decoder_pred"]}
    layers = [(f"blocks.{i}", f"vit.encoder.layer.{i}") for i in range(depth)]
    layers += [(f"decoder_blocks.{i}", f"decoder.decoder_layers.{i}") for i in range(decoder_depth)]
    for block, layer in layers:
        modules |= {
            f"{block}.norm1": [f"{layer}.layernorm_before"],
            f"{block}.norm2": [f"{layer}.layernorm_after"],
            f"{block}.attn.qkv": [f"{layer}.attention.attention.query",
                                  f"{layer}.attention.attention.key",
                                  f"{layer}.attention.attention.value"],
            f"{block}.attn.proj": [f"{layer}.attention.output.dense"],
            f"{block}.mlp.fc1": [f"{layer}.intermediate.dense"],
            f"{block}.mlp.fc2": [f"{layer}.output.dense"]}
    for module, parts in modules.items():
        for kind in ("weight", "bias"):
            names[f"{module}.{kind}"] = [f"{part}.{kind}" for part in parts]
    return names


HF_PATCHES = "embeddings.patch_embeddings.projection.weight"
HF_SPELLINGS = (  # of transformers 5's modules and of the files it writes -> of all other files
    ("vit.layers.", "vit.encoder.layer."),
    ("decoder.decoder_encoder.layer.", "decoder.decoder_layers."),
    (".attention.q_proj.", ".attention.attention.query."),
    (".attention.k_proj.", ".attention.attention.key."),
    (".attention.v_proj.", ".attention.attention.value."),
    (".attention.o_proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."), (".mlp.fc2.", ".output.dense."))


def from_hf(state):
    """Weights with Hugging Face's names of ViTMAE -> with official names. Unknown ones stay."""
    found = {}
    for name, tensor in state.items():
        if name.startswith(("embeddings.", "encoder.", "layers.", "layernorm.")):
            name = "vit." + name  # of the encoder alone, ViTMAEModel
        for spelling, usual in HF_SPELLINGS:
            name = name.replace(spelling, usual)
        found[name] = tensor
    depth = sum(name.startswith("vit.") and name.endswith(".layernorm_before.weight")
                for name in found)
    decoder_depth = sum(name.startswith("decoder.") and name.endswith(".layernorm_before.weight")
                        for name in found)
    weights = {}
    for name, parts in hf_names(depth, decoder_depth).items():
        if all(part in found for part in parts):
            weights[name] = torch.cat([found.pop(part) for part in parts])
    return weights | found


def hf_settings(file, width, depth):
    """What the config.json beside Hugging Face's weights tells; {} where there is none."""
    path = Path(file).with_name("config.json")
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text())
        activation = config.get("hidden_act", "gelu")
        settings = {"num_heads": config["num_attention_heads"]}
        found = (config["hidden_size"], config["num_hidden_layers"])
    except (ValueError, AttributeError, KeyError) as e:
        raise WeightsError(f"{path} is not the config.json of a ViT: {e!r}.") from None
    if found != (width, depth):
        raise WeightsError(f"{path} does not belong to {file}: its width and depth are {found}, "
                           f"those of the weights {(width, depth)}.")
    if activation != "gelu":
        raise WeightsError(f"{path}: hidden_act is {activation}, but MAE's models compute gelu.")
    for ours, theirs in (("decoder_embed_dim", "decoder_hidden_size"),
                         ("decoder_depth", "decoder_num_hidden_layers"),
                         ("decoder_num_heads", "decoder_num_attention_heads"),
                         ("norm_pix_loss", "norm_pix_loss")):
        if theirs in config:
            settings[ours] = config[theirs]
    return settings


CONTAINERS = ("model", "state_dict", "teacher", "model_ema",  # MAE, MoCo and timm, DINO, DeiT
              "model_state_dict")  # torch's tutorials
WRAPPERS = r"((module|backbone|encoder|base_encoder)\.)*"  # DDP, DINO, SimMIM, MoCo v3
PATCHES = "patch_embed.proj.weight"


def strip_prefix(weights, path, ending):
    """The weights of the one encoder among `weights`, without the prefix of their names.

    ending: how the name of its patch embedding ends. Weights with another prefix are left out, such
    as DINO's head. If there are several encoders, the one is taken whose prefix is one of WRAPPERS.
    """
    prefixes = [name.removesuffix(ending) for name in weights if name.endswith(ending)]
    if len(prefixes) > 1:
        prefixes = [prefix for prefix in prefixes if re.fullmatch(WRAPPERS, prefix)] or prefixes
    if len(prefixes) > 1:
        raise WeightsError(f"{path} holds several encoders: {', '.join(prefixes)}. Save the "
                           "weights of one of them in a file of its own.")
    if not prefixes:
        raise WeightsError(f"{path} holds no encoder: no {PATCHES} among its {len(weights)} "
                           f"tensors {', '.join(list(weights)[:4])}. Give another file.")
    prefix = prefixes[0]
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items()
            if name.startswith(prefix)}


def holds_tensors(value):
    return isinstance(value, dict) and any(isinstance(v, torch.Tensor) for v in value.values())


def read_weights(path):
    """A checkpoint -> weights under official names, the settings it tells, class names or None.

    Reads our checkpoints, the official MAE's, timm's and Hugging Face's ViTMAE (a file, or a folder
    that save_pretrained wrote). The weights may lie in one of CONTAINERS, and their names may have
    any prefix. Only ours and Hugging Face's config.json tell the head count. The path "none" gives
    ({}, {}, None). Raises WeightsError.
    """
    if path == "none":
        return {}, {}, None
    file = Path(path)
    if file.is_dir():
        names = ("model.safetensors", "pytorch_model.bin")
        files = [file / name for name in names if (file / name).is_file()]
        if not files:
            raise WeightsError(f"{path} is a folder without {' or '.join(names)}: give a file, "
                               f"such as {file / 'last.pt'}.")
        file = files[0]
    state = read_file(file)
    if not isinstance(state, dict):
        raise WeightsError(f"{path} holds a {type(state).__name__}, not a dict of weights.")
    if "modules" in state and "model" in state:  # ours; beside the model's they hold the probe's
        weights = {k[6:]: v for k, v in state["modules"].items() if k.startswith("model.")}
        check_finite(weights, path)
        settings = dict(state["model"])
        if "model_class" in state:
            settings["model_class"] = state["model_class"]
        return weights, settings, state.get("classes")

    containers = [name for name in CONTAINERS if holds_tensors(state.get(name))]
    if len(containers) > 1:
        warnings.warn(f"{path} holds {' and '.join(containers)}: {containers[0]} is taken.")
    weights = state[containers[0]] if containers else state
    weights = {str(name).replace("_orig_mod.", ""): tensor for name, tensor in weights.items()
               if isinstance(tensor, torch.Tensor)}  # torch.compile wraps parts of a model, too
    is_hf = any(name.endswith(HF_PATCHES) for name in weights)
    if is_hf:
        ending = HF_PATCHES
        if any(name.endswith("vit." + HF_PATCHES) for name in weights):
            ending = "vit." + HF_PATCHES
        weights = from_hf(strip_prefix(weights, path, ending))
    else:
        weights = strip_prefix(weights, path, PATCHES)
    check_finite(weights, path)
    try:
        width, _, _, patch = weights[PATCHES].shape
        depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        settings = dict(img_size=math.isqrt(weights["pos_embed"].shape[1] - 1) * patch,
                        patch_size=patch, embed_dim=width, depth=depth,
                        mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] / width)
    except KeyError as e:
        raise WeightsError(f"{path} holds no encoder: {e} is not in it, but "
                           f"{', '.join(list(weights)[:4])}...") from None
    if is_hf:
        settings |= hf_settings(file, width, depth)
    return weights, settings, None


def vit_settings(name, ckpt_settings, path):
    """The encoder's settings: of a name in VIT_SIZES, or else of a checkpoint, or else ViT-B's.

    ckpt_settings: what read_weights found in the checkpoint at `path`; {} when there is none. If
    it tells the mean and deviation of its pictures, they are in the result too. Raises WeightsError
    where the name and the checkpoint differ, in the head count too, which no shape would show.
    """
    if name:
        size = vit_size(name)
        mismatches = size_mismatches(size, ckpt_settings)
        if mismatches:
            raise WeightsError(f"{path} is not {name}: {', '.join(mismatches)}.")
    elif "num_heads" in ckpt_settings:  # it tells its whole size
        size = {key: ckpt_settings[key] for key in vit_size("vit_base_patch16")}
    elif ckpt_settings:  # its shapes tell all but the head count, which the size of that width has
        size = size_of_shapes(ckpt_settings, path)
    else:
        size = vit_size("vit_base_patch16")
    return size | {key: ckpt_settings[key] for key in ("mean", "std") if key in ckpt_settings}


def size_mismatches(size, ckpt_settings):
    """In which settings a checkpoint is not of a size, in words; those it does not tell fit."""
    return [f"{key} {ckpt_settings[key]} there, {value} here" for key, value in size.items()
            if ckpt_settings.get(key, value) != value]


def size_of_shapes(ckpt_settings, path):
    """The encoder's settings of the one of VIT_SIZES that a checkpoint's shapes fit."""
    for name in VIT_SIZES:
        if not size_mismatches(vit_size(name), ckpt_settings):
            return vit_size(name)
    shape = ", ".join(f"{key} {ckpt_settings[key]}" for key in ("patch_size", "embed_dim", "depth"))
    raise WeightsError(f"{path} is of no known size ({shape}). Known: {', '.join(VIT_SIZES)}. Add "
                       "its size to SIZES in models_mae.py.")


def resume(path, settings, defaults, extendable=(), extend=False, **parts):
    """Loads a run's parts from the checkpoint that it goes on from -> its state; None for no path.

    Raises WeightsError where a setting is another one than in the checkpoint. A setting that the
    checkpoint does not know counts as its default, and without a default as the same. extend:
    whether the extendable ones may differ.
    """
    if path is None:
        return None
    try:
        state = read_file(path)
        saved = settings | defaults | state["settings"]
        missing = set(parts) - set(state)
    except WeightsError as e:
        raise WeightsError(f"{e} Or start over: --resume none.") from None
    except (TypeError, KeyError, IndexError):
        missing = {"settings"}
    if missing:
        raise WeightsError(f"{path} is not a checkpoint of such a run: it has no "
                           f"{', '.join(sorted(missing))}. --resume none starts over.")
    different = [k for k, v in settings.items() if saved[k] != v]
    if extend:
        different = [k for k in different if k not in extendable]
    if different:
        mismatches = "; ".join(f"{k}: {saved[k]} there, {settings[k]} here" for k in different)
        remedy = ("Give the same, another --output-dir, or --resume none to start over. (If that "
                  f"began this run, delete {path} instead.)")
        if set(different) <= set(extendable):
            remedy += " Or add --extend, and the run goes on with the new ones."
        raise WeightsError(f"{path} belongs to a run with other settings: {mismatches}. {remedy}")
    for name in parts:
        check_finite(state[name], path)
    for name, part in parts.items():
        try:
            part.load_state_dict(state.pop(name))  # not kept twice
        except (KeyError, RuntimeError, ValueError) as e:
            raise WeightsError(f"{path}, {name}: {e}. --resume none starts over.") from e
    return state


def load_into(model, weights, path, fresh=()):
    """Loads weights into a model, the position table resampled to its size.

    fresh: how the names begin that keep their new values. A decoder, head or norm that the model
    does not have is left out; a finetuned fc_norm takes the place of a missing norm. Raises
    WeightsError that names what is wrong.
    """
    own = model.state_dict()
    if "norm.weight" in own and "norm.weight" not in weights:
        weights = {k.replace("fc_norm.", "norm."): v for k, v in weights.items()}
    grid = math.isqrt(own["pos_embed"].shape[1] - 1)
    unused = ("mask_token", "decoder", "norm.", "fc_norm.", "head.")
    weights = {k: v for k, v in weights.items() if k in own or not k.startswith(unused)}
    weights |= {k: v for k, v in own.items() if k.startswith(fresh)}
    try:
        weights["pos_embed"] = resample_abs_pos_embed(weights["pos_embed"], [grid, grid])
        model.load_state_dict(weights)
    except RuntimeError as e:  # torch's words on several lines
        raise WeightsError(f"{path} does not fit the model. {' '.join(str(e).split())} If a class "
                           "of your own made it, give it: load_mae(path, YourClass).") from e


def init_from(model, name, path):
    """Loads a checkpoint into mae_{name} -> whether its decoder fitted too. WeightsError."""
    weights, ckpt_settings, _ = read_weights(path)
    vit_settings(name, ckpt_settings, path)
    for key in ("mean", "std"):
        theirs = ckpt_settings.get(key, model.settings[key])
        if theirs != model.settings[key]:
            raise WeightsError(f"{path} was trained on pictures with the {key} {theirs}: give "
                               f"these numbers to --{key}.")
    own = model.state_dict()
    weights |= {k: own[k] for k in own if "pos_embed" in k}  # fixed, of this size
    decoder = [k for k in (*own, *weights) if k.startswith(("mask_token", "decoder"))]
    fits = all(k in own and k in weights and weights[k].shape == own[k].shape for k in decoder)
    fits &= ckpt_settings.get("decoder_num_heads", 0) in (0, model.settings["decoder_num_heads"])
    load_into(model, weights, path, fresh=() if fits else ("mask_token", "decoder"))
    return fits


def decoder_heads(settings, path):
    """The decoder's head count of the size in SIZES that has the same widths. WeightsError."""
    for size in SIZES.values():
        if all(size[key] == settings[key] for key in ("embed_dim", "decoder_embed_dim")):
            return size["decoder_num_heads"]
    raise WeightsError(f"{path} does not tell its decoder's head count: give it, "
                       f"load_mae({str(path)!r}, decoder_num_heads=N).")


def load_mae(path, model_class=MaskedAutoencoderViT, **settings):
    """A trained MaskedAutoencoderViT in eval mode, from any file that read_weights reads.

    model_class: your own class; a checkpoint holds the name of its class, and another one is
    refused. settings: what an official file does not tell, such as norm_pix_loss=False. Raises
    WeightsError.
    """
    weights, ckpt_settings, _ = read_weights(path)
    if "decoder_pred.weight" not in weights:
        raise WeightsError(f"{path} has no decoder: it is not a masked autoencoder's.")
    found = ckpt_settings | settings
    made_by = found.pop("model_class", model_class.__name__)
    if made_by != model_class.__name__:
        raise WeightsError(f"{path} is of the class {made_by}, not {model_class.__name__}: give "
                           f"it, load_mae({str(path)!r}, {made_by}).")
    if "decoder_depth" not in ckpt_settings:  # from the weights' shapes
        found |= vit_settings(None, found, path)
        found["decoder_embed_dim"] = weights["mask_token"].shape[2]
        found["decoder_depth"] = sum(name.startswith("decoder_blocks.") and
                                     name.endswith("norm1.weight") for name in weights)
        if "decoder_num_heads" not in found:
            found["decoder_num_heads"] = decoder_heads(found, path)
    found["target_dim"] = len(weights["decoder_pred.bias"])
    active_decoder_blocks = found.pop("active_decoder_blocks", None)
    model = model_class(**found)
    if active_decoder_blocks is not None:  # the last stage did not use all
        model.active_decoder_blocks = active_decoder_blocks
    load_into(model, weights, path)
    return model.eval()


def export_timm(source, out, num_classes):
    """Writes the encoder as a file for timm.create_model -> its last line for the user."""
    weights, ckpt_settings, _ = read_weights(source)
    # What timm's ViT has: with mask_token timm would take it for DINOv2
    taken = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.", "fc_norm.")
    if num_classes:
        taken += ("head.",)
    weights = {name: tensor for name, tensor in weights.items() if name.startswith(taken)}
    if len(weights.get("head.weight", ())) != num_classes:  # timm loads strictly
        weights["head.weight"] = torch.zeros(num_classes, weights["cls_token"].shape[2])
        weights["head.bias"] = torch.zeros(num_classes)
    out = Path(out)
    if out.exists() and out.samefile(source):
        raise WeightsError(f"{out} is the checkpoint itself: give another file to write.")
    tmp_path = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    try:
        with open(tmp_path, "wb") as file:
            torch.save(weights, file)
        os.replace(tmp_path, out)
    finally:
        tmp_path.unlink(missing_ok=True)
    pool = "avg" if "fc_norm.weight" in weights else "token"
    line = f"{out}: {len(weights)} tensors, for timm.create_model(..., global_pool={pool!r})"
    mean = ckpt_settings.get("mean", IMAGENET_MEAN)
    std = ckpt_settings.get("std", IMAGENET_STD)
    if (mean, std) != (IMAGENET_MEAN, IMAGENET_STD):
        line += f", of pictures normalised by mean {mean} and deviation {std}"
    return line


def export_hf(source, out):
    """Writes a folder for Hugging Face's ViTMAE, with the decoder -> its last line for the user."""
    model = load_mae(source)
    found = model.settings
    weights = model.state_dict()
    tensors = {}
    for name, parts in hf_names(found["depth"], model.active_decoder_blocks).items():
        if name in weights:
            for part, tensor in zip(parts, weights[name].chunk(len(parts))):
                tensors[part] = tensor.clone()
    config = {"architectures": ["ViTMAEForPreTraining"], "model_type": "vit_mae",
              "image_size": found["img_size"], "patch_size": found["patch_size"],
              "num_channels": 3, "qkv_bias": True, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
              "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
              "hidden_size": found["embed_dim"], "num_hidden_layers": found["depth"],
              "num_attention_heads": found["num_heads"],
              "intermediate_size": len(weights["blocks.0.mlp.fc1.bias"]),
              "decoder_hidden_size": found["decoder_embed_dim"],
              "decoder_num_hidden_layers": model.active_decoder_blocks,
              "decoder_num_attention_heads": found["decoder_num_heads"],
              "decoder_intermediate_size": len(weights["decoder_blocks.0.mlp.fc1.bias"]),
              "mask_ratio": 0.75, "norm_pix_loss": found["norm_pix_loss"]}
    side = {"height": found["img_size"], "width": found["img_size"]}
    pictures = {"image_processor_type": "ViTImageProcessor", "do_resize": True, "size": side,
                "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
                "image_mean": model.mean.flatten().tolist(),  # not those that it takes by itself
                "image_std": model.std.flatten().tolist()}
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise WeightsError(f"{out} is there already: give a new folder.")
    tmp_path = out.absolute().with_name(f".{out.absolute().name}.tmp-{os.getpid()}")
    try:
        tmp_path.mkdir(parents=True)
        (tmp_path / "config.json").write_text(json.dumps(config, indent=2))
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(pictures, indent=2))
        safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        os.replace(tmp_path, out)
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)
    return (f"{out}: {len(tensors)} tensors, for "
            f"transformers.ViTMAEForPreTraining.from_pretrained({str(out)!r})")


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    target = p.add_mutually_exclusive_group(required=True)
    target.add_argument("--export-timm", nargs=2, metavar=("CHECKPOINT", "OUT"),
                        help="write the encoder of CHECKPOINT as a file that timm loads")
    target.add_argument("--export-hf", nargs=2, metavar=("CHECKPOINT", "OUT"),
                        help="write CHECKPOINT, decoder too, as a folder for Hugging Face's ViTMAE")
    p.add_argument("--num-classes", type=int, default=1000,
                   help="classes of timm's model; 0: it has no head")
    args = p.parse_args()
    try:
        if args.export_timm:
            print(export_timm(*args.export_timm, args.num_classes))
        else:
            print(export_hf(*args.export_hf))
    except (WeightsError, OSError) as e:
        raise SystemExit(f"models_mae: {e}")


if __name__ == "__main__":
    main()
