"""The masked autoencoder, the ViT it becomes, and their weights.

MAE (He et al., arXiv 2111.06377) with the official parameter names, so that official checkpoints load both ways.
Shapes: B images, L patches, K kept, D width, P = p * p * 3 pixel values of a patch. Needs torch and timm.
"""
import argparse
import contextlib
import json
import math
import os
import zipfile
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models.vision_transformer import Block, VisionTransformer
from torch.utils.checkpoint import checkpoint

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# --- counting
def num_kept(num_patches, mask_ratio):
    """Visible tokens: int(L * (1 - m)), safe against float error: 100 patches at 0.9 keep 10."""
    return int(round(num_patches * (1 - mask_ratio), 6))


def num_decoded(num_patches, kept, decoder_keep):
    """Removed patches that the decoder reconstructs: a share of them, at least one."""
    return max(1, round((num_patches - kept) * decoder_keep))


def flops_per_image(resolution, mask_ratio, decoder_keep=1.0, patch_size=16, embed_dim=768, depth=12,
                    decoder_embed_dim=512, decoder_depth=8, mlp_ratio=4.0, **_):
    """Floating-point operations to train on one image, the probe aside: what torch.utils.flop_counter counts.

    Takes a model's `settings` as keywords; the defaults are ViT-B/16. A multiply-add is 2; backward is twice forward,
    but once for the patch embedding, whose input needs no gradient. What fused attention computes a second time in
    its backward pass (torch counts it there: 5 products instead of 4) is no model FLOP and does not raise an MFU.
    """
    patches, pixels = (resolution // patch_size) ** 2, 3 * patch_size ** 2
    kept = num_kept(patches, mask_ratio)
    decoded = num_decoded(patches, kept, decoder_keep)

    def blocks(tokens, width, depth):
        return depth * ((4 + 2 * mlp_ratio) * tokens * width ** 2 + 2 * tokens ** 2 * width)
    forward = (blocks(kept + 1, embed_dim, depth) + (kept + 1) * embed_dim * decoder_embed_dim
               + blocks(1 + kept + decoded, decoder_embed_dim, decoder_depth)
               + (1 + patches if decoder_keep == 1 else decoded) * decoder_embed_dim * pixels)
    return 2 * (3 * forward + 2 * kept * pixels * embed_dim)


# --- orders of patches
def inverse(order):
    """(B, L) permutations -> their inverses, without a second sort."""
    return order.scatter(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))


def take(x, index):
    """Rows of x (B or 1, L, D) at index (B, K) -> (B, K, D)"""
    return x.expand(len(index), -1, -1).gather(1, index[..., None].expand(-1, -1, x.shape[2]))


class Reorder(torch.autograd.Function):
    """Tokens (B, L, D) in another order; the gradient is a gather too, torch's own is a scatter-add with atomics."""

    @staticmethod
    def forward(ctx, x, order, back):
        ctx.save_for_backward(back)
        return take(x, order)

    @staticmethod
    def backward(ctx, grad):
        return take(grad, *ctx.saved_tensors), None, None


# --- pixels and positions
def patchify(imgs, patch_size):
    """(B, 3, H, W) -> (B, L, P), each patch's pixels ordered (row, column, channel)."""
    B, C, H, W = imgs.shape
    p = patch_size
    x = imgs.reshape(B, C, H // p, p, W // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // p) * (W // p), p * p * C)


def unpatchify(x, patch_size):
    """(B, L, P) -> (B, 3, H, W) of a square picture."""
    B, L, P = x.shape
    g, p = int(L ** 0.5), patch_size
    return x.reshape(B, g, g, p, p, 3).permute(0, 5, 1, 3, 2, 4).reshape(B, 3, g * p, g * p)


def sincos_table(dim, grid):
    """(1, 1 + grid * grid, dim) fixed position table: zeros for the class token, then column half, row half."""
    omega = 1 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, dim / 2)
    column = axis[None].expand(grid, grid, -1)
    row = axis[:, None].expand(grid, grid, -1)
    table = torch.cat([column, row], dim=2).reshape(grid * grid, dim)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), table])[None].float()


def resample_table(table, grid):
    """Position table (1, 1 + n * n, D) for a grid x grid picture: bicubic, antialiased; unchanged at its own grid."""
    n, D = int((table.shape[1] - 1) ** 0.5), table.shape[2]
    if n == grid:
        return table
    patches = table[:, 1:].float().reshape(1, n, n, D).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([table[:, :1].float(), patches.flatten(2).transpose(1, 2)], dim=1).to(table.dtype)


def init_linear(m):
    """MAE's initialisation: xavier uniform linears without bias, LayerNorm 1 and 0."""
    if isinstance(m, nn.Linear):
        nn.init.xavier_uniform_(m.weight)
        if m.bias is not None:
            nn.init.zeros_(m.bias)
    elif isinstance(m, nn.LayerNorm):
        nn.init.ones_(m.weight)
        nn.init.zeros_(m.bias)


def init_encoder(model):
    """What MAE and ViT start from, and ImageNet's mean and deviation as buffers that no checkpoint holds."""
    model.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
    model.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
    model.apply(init_linear)
    nn.init.xavier_uniform_(model.patch_embed.proj.weight.flatten(1))
    nn.init.zeros_(model.patch_embed.proj.bias)
    nn.init.normal_(model.cls_token, std=0.02)


def resample_again(model, incompatible_keys):
    """After loading: the tables that `prepare` made belong to the weights before."""
    model.prepare(*model.grids)


class PatchEmbed(nn.Module):
    """Holds the patch projection under its official name and shape; applied as a matrix product to patches."""

    def __init__(self, patch_size, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, patch_size, patch_size)

    def forward(self, patches):
        """(B, K, P) -> (B, K, D)"""
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, P), pixels in patchify's order
        return F.linear(patches, weight, self.proj.bias)


class MaskedAutoencoderViT(nn.Module):
    """MAE: a ViT over the visible patches and a light decoder that predicts the pixels of the removed ones."""

    def __init__(self, img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, decoder_embed_dim=512,
                 decoder_depth=8, decoder_num_heads=16, mlp_ratio=4.0, norm_pix_loss=True):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"img_size {img_size} is not a multiple of patch_size {patch_size}")
        # Shapes do not tell the head counts: they travel with the weights and are compared on loading.
        self.settings = dict(img_size=img_size, patch_size=patch_size, embed_dim=embed_dim, depth=depth,
                             num_heads=num_heads, decoder_embed_dim=decoder_embed_dim, decoder_depth=decoder_depth,
                             decoder_num_heads=decoder_num_heads, mlp_ratio=mlp_ratio, norm_pix_loss=norm_pix_loss)
        self.patch_size, self.norm_pix_loss, grid = patch_size, norm_pix_loss, img_size // patch_size

        norm = partial(nn.LayerNorm, eps=1e-6)

        def stack(width, heads, depth):
            return nn.ModuleList([Block(width, heads, mlp_ratio, qkv_bias=True, norm_layer=norm) for _ in range(depth)])
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_table(embed_dim, grid), requires_grad=False)
        self.blocks = stack(embed_dim, num_heads, depth)
        self.norm = norm(embed_dim)

        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_table(decoder_embed_dim, grid), requires_grad=False)
        self.decoder_blocks = stack(decoder_embed_dim, decoder_num_heads, decoder_depth)
        self.decoder_norm = norm(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size ** 2 * 3)

        init_encoder(self)
        nn.init.normal_(self.mask_token, std=0.02)

        self.grids, self.recompute = (), False
        self.register_load_state_dict_post_hook(resample_again)

    def prepare(self, *grids):
        """Resamples the position tables to these grids now, once, instead of in every step; saved nowhere."""
        self.grids = grids
        for name in ("pos_embed", "decoder_pos_embed"):
            for grid in grids:
                table = resample_table(getattr(self, name), grid).detach()
                self.register_buffer(f"{name}_{grid}", table, persistent=False)

    def table(self, name, grid):
        """Position table (1, 1 + grid * grid, D), as prepared or resampled."""
        table = getattr(self, f"{name}_{grid}", None)
        return resample_table(getattr(self, name), grid) if table is None else table

    def normalize(self, imgs):
        """uint8 (B, 3, H, W) -> float, ImageNet mean and standard deviation; float input is taken as normalised."""
        return imgs if imgs.is_floating_point() else (imgs.float() / 255 - self.mean) / self.std

    def patches(self, imgs):
        """(B, 3, H, W), uint8 or normalised -> (B, L, P) float patches."""
        H, W = imgs.shape[-2:]
        if H != W or H % self.patch_size:
            raise ValueError(f"pictures of {H}x{W}: expected a square of whole {self.patch_size}-pixel patches")
        return patchify(self.normalize(imgs), self.patch_size)

    def through(self, blocks, x):
        """x (B, N, D) through blocks; with `recompute` set, backward computes what is inside a block a second time."""
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False) if self.recompute else block(x)
        return x

    def forward_encoder(self, patches, mask_ratio, noise=None):
        """(B, L, P) -> latent (B, 1 + K, D), mask (B, L; 1 = removed), ids_restore (B, L)."""
        B, L = patches.shape[:2]
        K = num_kept(L, mask_ratio)
        if noise is None:
            noise = torch.rand(B, L, device=patches.device)
        shuffle = noise.argsort(dim=1)
        restore, keep = inverse(shuffle), shuffle[:, :K]
        mask = (restore >= K).to(patches.dtype)
        pos = self.table("pos_embed", int(L ** 0.5))
        x = self.patch_embed(take(patches, keep)) + take(pos[:, 1:], keep)  # (B, K, D): only what is kept is embedded
        x = torch.cat([(self.cls_token + pos[:, :1]).expand(B, -1, -1).to(x.dtype), x], dim=1)
        return self.norm(self.through(self.blocks, x)), mask, restore

    def forward_decoder(self, latent, ids_restore, decoder_keep=1.0):
        """latent (B, 1 + K, D), ids_restore (B, L) -> predicted patches (B, L, P).

        decoder_keep < 1 reconstructs that share of the removed patches, those of the next smallest noise, from as few
        mask tokens (dual masking, VideoMAE V2, arXiv 2303.16727); the other rows of the prediction are zeros.
        """
        x = self.decoder_embed(latent)
        (B, L), K = ids_restore.shape, x.shape[1] - 1
        pos = self.table("decoder_pos_embed", int(L ** 0.5))
        N, shuffle = num_decoded(L, K, decoder_keep), inverse(ids_restore)
        masks = self.mask_token.to(x.dtype).expand(B, N, -1)
        if decoder_keep == 1:
            tokens = Reorder.apply(torch.cat([x[:, 1:], masks], dim=1), ids_restore, shuffle)
            x = torch.cat([x[:, :1], tokens], dim=1) + pos
        else:  # attention knows no order: the tokens stay as noise shuffled them, each with its own position
            places = torch.cat([torch.zeros_like(shuffle[:, :1]), shuffle[:, :K + N] + 1], dim=1)
            x = torch.cat([x, masks], dim=1) + take(pos, places)
        x = self.through(self.decoder_blocks, x)
        if decoder_keep == 1:
            return self.decoder_pred(self.decoder_norm(x))[:, 1:]
        pred = self.decoder_pred(self.decoder_norm(x[:, 1 + K:]))  # (B, N, P)
        index = shuffle[:, K:K + N, None].expand(-1, -1, pred.shape[2])
        return pred.new_zeros(B, L, pred.shape[2]).scatter(1, index, pred)

    def forward_loss(self, patches, pred, mask):
        """Mean square error over the removed patches, in float32 whatever pred is; targets normalised per patch."""
        target = patches
        if self.norm_pix_loss:
            var, mean = torch.var_mean(target, dim=-1, keepdim=True)  # unbiased
            target = (target - mean) / (var + 1e-6) ** 0.5
        loss = (pred.to(target.dtype) - target).square().mean(dim=-1)  # (B, L)
        return (loss * mask).sum() / mask.sum()

    def forward(self, imgs, mask_ratio=0.75, noise=None, decoder_keep=1.0):
        """imgs (B, 3, H, W), uint8 or normalised float -> loss, pred (B, L, P), mask (B, L; 1 = removed).

        noise (B, L) fixes the mask: the patches with the smallest values stay. With decoder_keep < 1 the mask is 1 only
        where a removed patch was reconstructed, and pred is zero elsewhere.
        """
        loss, pred, mask, _ = self.train_parts(imgs, mask_ratio, noise, decoder_keep)
        return loss, pred, mask

    def train_parts(self, imgs, mask_ratio, noise, decoder_keep):
        """As forward, and the latent (B, 1 + K, D), for a probe."""
        patches = self.patches(imgs)
        latent, mask, restore = self.forward_encoder(patches, mask_ratio, noise)
        pred = self.forward_decoder(latent, restore, decoder_keep)
        if decoder_keep != 1:
            L, K = mask.shape[1], latent.shape[1] - 1
            mask = mask * (restore < K + num_decoded(L, K, decoder_keep))
        return self.forward_loss(patches, pred, mask), pred, mask, latent

    @torch.no_grad()
    def features(self, imgs):
        """Mean of the final patch tokens of the whole picture, (B, D)."""
        patches = self.patches(imgs)
        in_order = torch.arange(patches.shape[1], device=imgs.device).expand(patches.shape[:2])
        return self.forward_encoder(patches, 0.0, in_order)[0][:, 1:].mean(dim=1)


# --- sizes: MAE's B, L, H; S and Ti are not in MAE, their decoders are in proportion; nano is for CPUs: demo and tests
mae_vit_nano_patch8 = partial(MaskedAutoencoderViT, patch_size=8, embed_dim=128, depth=6, num_heads=4,
                              decoder_embed_dim=96, decoder_depth=2, decoder_num_heads=4)
mae_vit_tiny_patch16 = partial(MaskedAutoencoderViT, embed_dim=192, num_heads=3, decoder_embed_dim=128, decoder_depth=4,
                               decoder_num_heads=4)
mae_vit_small_patch16 = partial(MaskedAutoencoderViT, embed_dim=384, num_heads=6, decoder_embed_dim=256,
                                decoder_num_heads=8)
mae_vit_base_patch16 = partial(MaskedAutoencoderViT)
mae_vit_large_patch16 = partial(MaskedAutoencoderViT, embed_dim=1024, depth=24, num_heads=16)
mae_vit_huge_patch14 = partial(MaskedAutoencoderViT, patch_size=14, embed_dim=1280, depth=32, num_heads=16)
SIZES = ("mae_vit_nano_patch8", "mae_vit_tiny_patch16", "mae_vit_small_patch16", "mae_vit_base_patch16",
         "mae_vit_large_patch16", "mae_vit_huge_patch14")


# --- the ViT it becomes
class ViT(VisionTransformer):
    """timm's ViT, MAE's names and initialisation: uint8 or normalised (B, 3, H, W) -> (B, classes); 0 classes: (B, D).

    pool: "fc_norm", the mean of the last block's patch tokens, then a new norm (finetuning); "mean" or "cls" of the
    tokens after the pretrained norm (frozen features). The position table belongs to img_size: at another resolution
    each forward resamples it, differentiably, so that all stages train the one table. settings: from vit_settings.
    """
    normalize = MaskedAutoencoderViT.normalize

    def __init__(self, settings, img_size=224, classes=1000, pool="fc_norm", drop_path=0.0):
        if img_size % settings["patch_size"]:
            raise WeightsError(f"pictures of {img_size} pixels are not whole patches of {settings['patch_size']}")
        super().__init__(img_size, num_classes=classes, global_pool="token" if pool == "cls" else "avg",
                         fc_norm=pool == "fc_norm", drop_path_rate=drop_path, dynamic_img_size=True,
                         norm_layer=partial(nn.LayerNorm, eps=1e-6), **settings)
        self.settings = {**settings, "img_size": img_size}
        init_encoder(self)
        self.pos_embed.data.copy_(sincos_table(settings["embed_dim"], img_size // settings["patch_size"]))
        if classes:
            trunc_normal_(self.head.weight, std=2e-5)

    def forward(self, imgs):
        return super().forward(self.normalize(imgs))


VIT_SIZES = tuple(name.replace("mae_", "") for name in SIZES)


def size_of(name):
    """The encoder settings of a name in VIT_SIZES; its defaults are MAE-B's."""
    base = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4.0)
    given = globals()["mae_" + name].keywords
    return {k: given.get(k, v) for k, v in base.items()}


# --- weights in and out
class WeightsError(ValueError):
    """What is wrong with a checkpoint, in words for the one who runs it."""


def save_checkpoint(state, path, keep=None):
    """Writes a checkpoint aside and renames it: `path` is always a whole one, and `keep` the one that it was before."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with open(aside, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        try:
            zipfile.ZipFile(aside).close()  # its end can be read
        except zipfile.BadZipFile as e:
            raise OSError(f"what was written cannot be read back: {e}") from e
        if keep and path.is_file():
            link = keep.with_name(f".{keep.name}.tmp")
            try:
                link.unlink(missing_ok=True)
                os.link(path, link)
                os.replace(link, keep)
            except OSError:  # a file system without links: for a moment there is no `path`
                os.replace(path, keep)
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


def find_damage(path):
    """What is wrong with a torch file by its checksums, which torch.load does not look at; None if nothing is."""
    try:
        with zipfile.ZipFile(path) as z:
            return z.testzip()
    except Exception as e:  # a damaged file can raise anything
        return e


def find_checkpoint(folder, resume, say):
    """The checkpoint of --resume: of `auto`, the newest in the run's folder whose checksums hold, or None.

    Rank 0 looks, and all ranks get what it found. Raises WeightsError where all that is there is damaged.
    """
    found, damaged = [None], []
    if not dist.is_initialized() or dist.get_rank() == 0:
        names = {"auto": (folder / "last.pt", folder / "previous.pt"), "none": ()}.get(resume, (Path(resume),))
        for path in (path for path in names if path.is_file() or resume != "auto"):
            wrong = find_damage(path) if path.is_file() else "there is no such file"
            if wrong is None:
                found = [path]
                break
            damaged.append(f"{path} is damaged ({wrong})")
        if damaged and found[0]:
            say(f"{damaged[0]}: going on from the one before, {found[0]}")
        elif damaged:
            found = [WeightsError(f"{'; '.join(damaged)}. Name another --resume CHECKPOINT, or start anew: "
                                  "--resume none")]
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0, device=torch.device("cpu"))
    if isinstance(found[0], WeightsError):
        raise found[0]
    return found[0]


# ViTMAEForPreTraining's names -> the official ones, in this order; its decoder is not read
HUGGING_FACE = (("vit.", ""), ("embeddings.cls_token", "cls_token"), ("embeddings.position_embeddings", "pos_embed"),
                ("embeddings.patch_embeddings.projection", "patch_embed.proj"), ("encoder.layer.", "blocks."),
                ("layernorm_before", "norm1"), ("layernorm_after", "norm2"), ("attention.output.dense", "attn.proj"),
                ("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2"), ("layernorm.", "norm."))


def from_hugging_face(state):
    """ViTMAE's weights under the official names; query, key and value become one matrix."""
    weights = {}
    for key, value in state.items():
        if not key.startswith("decoder."):
            for theirs, ours in HUGGING_FACE:
                key = key.replace(theirs, ours)
            weights[key] = value
    for key in [k for k in weights if ".attention.attention.query." in k]:
        parts = [weights.pop(key.replace("query", part)) for part in ("query", "key", "value")]
        weights[key.replace("attention.attention.query", "attn.qkv")] = torch.cat(parts)
    return weights


def read_weights(path):
    """A checkpoint's weights under official names, settings as far as it tells, class names or None; or WeightsError.

    Reads ours, official MAE's, timm's and Hugging Face's ViTMAEForPreTraining, as torch files or .safetensors. The head
    count is told by ours, and by Hugging Face's config.json beside the file.
    """
    try:
        if zipfile.is_zipfile(path) and (wrong := find_damage(path)):
            raise ValueError(f"it is damaged: {wrong}")
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file  # timm brings it
            state = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # official checkpoints hold their command line
                state = torch.load(path, map_location="cpu", weights_only=True)
        ours = "modules" in state
        weights = state["modules"] if ours else state.get("model", state.get("state_dict", state))
        weights = {k.removeprefix("module."): v for k, v in weights.items()}
    except Exception as e:  # a damaged file can raise anything
        raise WeightsError(f"{path}: not a checkpoint that can be read ({e})") from e
    if ours:  # beside the model they may hold the probe's head
        weights = {k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")}
    elif any(k.endswith("embeddings.cls_token") for k in weights):
        weights = from_hugging_face(weights)
    try:
        width, _, _, patch = weights["patch_embed.proj.weight"].shape
        settings = dict(img_size=math.isqrt(weights["pos_embed"].shape[1] - 1) * patch, patch_size=patch,
                        embed_dim=width, mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] / width,
                        depth=1 + max(int(k.split(".")[1]) for k in weights if k.startswith("blocks.")))
    except KeyError as e:
        raise WeightsError(f"{path} holds no encoder weights: {e} is not among its {len(weights)} entries "
                           f"({', '.join(map(str, list(weights)[:4]))}, ...)") from None
    config = Path(path).with_name("config.json")
    if ours:
        settings["num_heads"] = state["model"]["num_heads"]
    elif config.is_file() and "num_attention_heads" in (told := json.loads(config.read_text())):
        settings["num_heads"] = told["num_attention_heads"]
    return weights, settings, state.get("classes") if ours else None


def vit_settings(name, found, path):
    """The encoder's settings from a name in VIT_SIZES or None, and what read_weights found ({} when from scratch).

    Raises WeightsError where the two differ, in the head count too, which no shape would show.
    """
    if name is None and found:
        fits = [s for s in map(size_of, VIT_SIZES) if all(found.get(k, v) == v for k, v in s.items())]
        if not fits and "num_heads" not in found:
            raise WeightsError(f"{path} does not tell its number of heads, and no --model has its sizes ({found})")
        return {k: found.get(k, v) for k, v in (fits or [size_of("vit_base_patch16")])[0].items()}
    wanted = size_of(name or "vit_base_patch16")
    differ = [f"{k} {found[k]} there, {v} in {name}" for k, v in wanted.items() if found.get(k, v) != v]
    if differ:
        raise WeightsError(f"{path} is of another model: {', '.join(differ)}. Without --model its own sizes are taken.")
    return wanted


def load_encoder(model, weights, path, fresh=("fc_norm.", "head.")):
    """Loads weights into a ViT, the position table resampled; WeightsError names what is missing, left over, misshaped.

    fresh: prefixes of what starts anew. Left out without a word: decoder, mask token, a head or norm not in use.
    """
    own = model.state_dict()
    weights = {k: v for k, v in weights.items() if not k.startswith(fresh)}
    weights["pos_embed"] = resample_table(weights["pos_embed"], math.isqrt(own["pos_embed"].shape[1] - 1))
    unused = ("mask_token", "decoder", "norm.", "fc_norm.", "head.")
    wrong = {"missing": [k for k in own if k not in weights and not k.startswith(fresh)],
             "left over": [k for k in weights if k not in own and not k.startswith(unused)],
             "of another shape": [k for k in weights if k in own and weights[k].shape != own[k].shape]}
    if any(wrong.values()):
        raise WeightsError(f"{path} does not fit the model: "
                           + "; ".join(f"{what}: {', '.join(keys)}" for what, keys in wrong.items() if keys))
    model.load_state_dict({**own, **{k: v for k, v in weights.items() if k in own}})


def export_timm(source, out):
    """Writes an encoder for timm.create_model("vit_base_patch16_224", checkpoint_path=out), which loads it strictly.

    Without decoder and mask_token, for which timm would take it for DINOv2; where there is no head, zeros stand in.
    """
    weights, settings, _ = read_weights(source)
    weights = {k: v.contiguous() for k, v in weights.items() if not k.startswith(("mask_token", "decoder"))}
    weights.setdefault("head.weight", torch.zeros(1000, settings["embed_dim"]))
    weights.setdefault("head.bias", torch.zeros(len(weights["head.weight"])))
    torch.save(weights, out)
    print(f"{out}: {len(weights)} tensors, {settings}")


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--export-timm", nargs=2, metavar=("CKPT", "OUT"), required=True, help="encoder for timm")
    try:
        export_timm(*p.parse_args().export_timm)
    except WeightsError as e:
        raise SystemExit(f"models_mae: {e}")


if __name__ == "__main__":
    main()
