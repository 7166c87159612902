"""The masked autoencoder, the ViT it becomes, and their weights.

    mae = models_mae.load_mae("runs/pretrain/last.pt")  # ours or an official MAE checkpoint
    python models_mae.py --export-timm runs/pretrain/last.pt encoder.pt --num-classes 0

MAE (He et al., arXiv 2111.06377) with the official names, so that official checkpoints load both
ways. Needs torch and timm. Shapes: B images, L patches, K kept, D width, P = p * p * 3 pixel values
of a patch. Last line: `encoder.pt: 150 tensors, for timm.create_model(..., global_pool='token')`
"""
import argparse
import math
import warnings
from functools import partial

import safetensors.torch  # timm brings it
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed, trunc_normal_
from timm.models.vision_transformer import Block, VisionTransformer
from torch.utils.checkpoint import checkpoint


class WeightsError(ValueError):
    """A checkpoint, a size or a mask ratio that does not fit, and what to do."""


# --- masking: replace this one function to try another mask; training and pictures use it
def masking_noise(shape, generator=None, device=None):
    """shape (..., L) -> random numbers, patches row by row: the smallest K stay visible."""
    return torch.rand(shape, generator=generator, device=device)


# --- counting
def count_patches(size, patch_size):
    """Patches along a side of `size` pixels. Raises WeightsError where they are not whole."""
    if size < patch_size or size % patch_size:
        raise WeightsError(f"{size} pixels are not whole patches: give a multiple of {patch_size}.")
    return size // patch_size


def num_kept(num_patches, mask_ratio):
    """Visible patches: int(L * (1 - m)), safe against float error: 100 at 0.9 keep 10."""
    if not 0 <= mask_ratio < 1:
        raise WeightsError(f"mask ratio {mask_ratio}: expected at least 0 and below 1.")
    return int(round(num_patches * (1 - mask_ratio), 6))


def num_decoded(num_patches, kept, decoder_keep):
    """Removed patches that the decoder reconstructs: a share of them, at least one."""
    return max(min(1, num_patches - kept), round((num_patches - kept) * decoder_keep))


def flops_per_image(resolution, mask_ratio, decoder_keep=1.0, patch_size=16, embed_dim=768,
                    depth=12, decoder_embed_dim=512, decoder_depth=8, mlp_ratio=4.0, **_):
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
    forward += (kept + decoded) * decoder_embed_dim * pixels
    return 2 * (3 * forward + 2 * kept * pixels * embed_dim)


def sincos_table(dim, grid):
    """(1, 1 + grid * grid, dim): zeros for the class token; then column half, row half."""
    omega = 1 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, dim / 2)
    table = torch.cat([axis.repeat(grid, 1), axis.repeat_interleave(grid, dim=0)], dim=1)
    return F.pad(table, (0, 0, 1, 0))[None].float()


# --- common to both models
def init_weights(model):
    """MAE's initial weights; ImageNet's mean and deviation as buffers that no checkpoint holds."""
    for name, rgb in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
        model.register_buffer(name, torch.tensor(rgb).view(1, 3, 1, 1), persistent=False)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.patch_embed.proj.weight.flatten(1))
    nn.init.zeros_(model.patch_embed.proj.bias)
    nn.init.normal_(model.cls_token, std=0.02)


def normalize(model, imgs):
    """uint8 (B, 3, H, W) -> float, ImageNet's mean 0 and deviation 1; float stays as it is."""
    return imgs if imgs.is_floating_point() else (imgs.float() / 255 - model.mean) / model.std


@torch.no_grad()
def accuracy(batches, device):
    """All ranks' top-1, top-5 (from six classes) in percent, n: of scores (B, C), labels (B,)."""
    counts = torch.zeros(3, dtype=torch.float64, device=device)  # top-1, top-5, n
    for scores, labels in batches:
        hits = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]  # (B, 5)
        counts += torch.stack([hits[:, 0].sum(), hits.sum(), (labels == labels).sum()])
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(counts)
    top1, top5, n = counts.tolist()
    result = {"top1": 100 * top1 / n, "n": int(n)}
    return result | ({"top5": 100 * top5 / n} if scores.shape[1] > 5 else {})


# --- the masked autoencoder
class MaskedAutoencoderViT(nn.Module):
    """MAE: a ViT over the visible patches and a light decoder that predicts the others' pixels.

    settings: the arguments, which travel with the weights. recompute: activation checkpointing.
    """
    normalize = normalize

    def __init__(self, img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12,
                 decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16, mlp_ratio=4.0,
                 norm_pix_loss=True):
        settings = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.settings = settings  # shapes do not tell the head counts
        self.patch_size = patch_size
        self.norm_pix_loss = norm_pix_loss
        self.recompute = False
        grid = count_patches(img_size, patch_size)
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
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size ** 2 * 3)

        init_weights(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def patchify(self, imgs):
        """(B, 3, H, W) -> (B, L, P), each patch's pixels ordered (row, column, channel)."""
        p = self.patch_size
        grid = count_patches(imgs.shape[-1], p)
        x = imgs.reshape(len(imgs), 3, grid, p, grid, p)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(-1, grid * grid, p * p * 3)

    def unpatchify(self, x):
        """(B, L, P) -> (B, 3, H, W) of a square picture."""
        p = self.patch_size
        grid = math.isqrt(x.shape[1])
        x = x.reshape(-1, grid, grid, p, p, 3).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(-1, 3, grid * p, grid * p)

    def run_blocks(self, blocks, x):
        """x (B, N, D) through blocks -> (B, N, D)"""
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return x

    def forward_encoder(self, imgs, mask_ratio, noise=None):
        """(B, 3, H, W) -> latent (B, 1 + K, D), mask (B, L; 1 = removed), ids_restore (B, L)"""
        patches = self.patchify(self.normalize(imgs))  # (B, L, P)
        B, L = patches.shape[:2]
        K = num_kept(L, mask_ratio)
        if noise is None:
            noise = masking_noise((B, L), device=imgs.device)
        ids_shuffle = noise.argsort(dim=1)
        ids_restore = ids_shuffle.argsort(dim=1)
        ids_keep = ids_shuffle[:, :K]
        mask = (ids_restore >= K).to(patches.dtype)
        pos = resample_abs_pos_embed(self.pos_embed, [math.isqrt(L)] * 2)
        proj = self.patch_embed.proj
        weight = proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, P), in patchify's order
        patches = torch.take_along_dim(patches, ids_keep[..., None], dim=1)  # (B, K, P)
        x = F.linear(patches, weight, proj.bias)  # (B, K, D)
        x = x + torch.take_along_dim(pos[:, 1:], ids_keep[..., None], dim=1)
        cls_token = (self.cls_token + pos[:, :1]).expand(B, -1, -1)
        x = torch.cat([cls_token.to(x.dtype), x], dim=1)  # (B, 1 + K, D)
        return self.norm(self.run_blocks(self.blocks, x)), mask, ids_restore

    def forward_decoder(self, latent, ids_restore, decoder_keep=1.0):
        """latent (B, 1 + K, D), ids_restore (B, L) -> predicted patches (B, L, P).

        decoder_keep < 1 reconstructs that share of the removed patches, those of the next smallest
        noise (dual masking, VideoMAE V2, arXiv 2303.16727); the others' predictions are zeros.
        """
        B, L = ids_restore.shape
        K = latent.shape[1] - 1
        N = num_decoded(L, K, decoder_keep)
        # Attention knows no order: the tokens stay shuffled, each with its own position
        ids_shuffle = ids_restore.argsort(dim=1)[:, :K + N]
        positions = torch.cat([torch.zeros_like(ids_shuffle[:, :1]), ids_shuffle + 1], dim=1)
        pos = resample_abs_pos_embed(self.decoder_pos_embed, [math.isqrt(L)] * 2)
        x = self.decoder_embed(latent)  # (B, 1 + K, decoder D)
        mask_tokens = self.mask_token.to(x.dtype).expand(B, N, -1)
        x = torch.cat([x, mask_tokens], dim=1)  # (B, 1 + K + N, decoder D)
        x = x + torch.take_along_dim(pos, positions[..., None], dim=1)
        x = self.run_blocks(self.decoder_blocks, x)
        pred = self.decoder_pred(self.decoder_norm(x[:, 1:]))  # (B, K + N, P)
        index = ids_shuffle[..., None].expand(-1, -1, pred.shape[2])
        return pred.new_zeros(B, L, pred.shape[2]).scatter(1, index, pred)

    def forward_loss(self, imgs, pred, mask):
        """Mean square error over the patches with mask 1, in float32; a mask of zeros means all."""
        imgs = self.normalize(imgs)
        target = self.patchify(imgs.to(torch.promote_types(imgs.dtype, torch.float32)))  # (B, L, P)
        if self.norm_pix_loss:
            var, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (var + 1e-6) ** 0.5
        loss = (pred.to(target.dtype) - target).square().mean(dim=-1)  # (B, L)
        mask = torch.where(mask.any(), mask, torch.ones_like(mask)).to(loss.dtype)
        return (loss * mask).sum() / mask.sum()

    def forward(self, imgs, mask_ratio=0.75, noise=None, decoder_keep=1.0, return_latent=False):
        """imgs (B, 3, H, W), uint8 or normalised float -> loss, pred (B, L, P), mask (B, L).

        noise (B, L) fixes the mask, 1 = removed. With decoder_keep < 1 the mask is 1 only where a
        removed patch was reconstructed. return_latent adds the latent (B, 1 + K, D), for a probe.
        """
        if self.training and imgs.is_floating_point() and not torch.compiler.is_compiling():
            if imgs.min() >= 0 and imgs.max() <= 1:  # Python shows the warning once
                warnings.warn("float pictures within [0, 1] are not normalised: give uint8?")
        imgs = self.normalize(imgs)
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio, noise)
        pred = self.forward_decoder(latent, ids_restore, decoder_keep)
        K = latent.shape[1] - 1
        mask = mask * (ids_restore < K + num_decoded(mask.shape[1], K, decoder_keep))
        loss = self.forward_loss(imgs, pred, mask)
        return (loss, pred, mask, latent) if return_latent else (loss, pred, mask)

    @torch.no_grad()
    def reconstruct(self, imgs, mask_ratio=0.75, noise=None):
        """(B, 3, H, W) -> (3, B, 3, H, W) in [0, 1]: original, what is seen, reconstruction.

        A patch that was normalised for the loss gets back its own mean and deviation.
        """
        _, pred, mask = self(imgs, mask_ratio, noise)
        patches = self.patchify(self.normalize(imgs))
        if self.norm_pix_loss:
            var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
            pred = pred.float() * (var + 1e-6) ** 0.5 + mean
        visible = patches * (1 - mask[..., None])
        rows = torch.cat([patches, visible, visible + pred * mask[..., None]])  # (3 B, L, P)
        pixels = (self.unpatchify(rows) * self.std + self.mean).clamp(0, 1)
        return pixels.unflatten(0, (3, -1))

    @torch.no_grad()
    def features(self, imgs):
        """Mean of the final patch tokens of whole pictures, (B, D)."""
        L = (imgs.shape[-1] // self.patch_size) ** 2
        in_order = torch.arange(L, device=imgs.device).expand(len(imgs), L)
        latent, _, _ = self.forward_encoder(imgs, 0.0, in_order)
        return latent[:, 1:].mean(dim=1)


# --- sizes: MAE's B, L, H. S and Ti are not in MAE; nano is for CPUs: the demo and the tests
mae_vit_nano_patch8 = partial(MaskedAutoencoderViT, patch_size=8, embed_dim=128, depth=6,
                              num_heads=4, decoder_embed_dim=96, decoder_depth=2,
                              decoder_num_heads=4)
mae_vit_tiny_patch16 = partial(MaskedAutoencoderViT, embed_dim=192, num_heads=3,
                               decoder_embed_dim=128, decoder_depth=4, decoder_num_heads=4)
mae_vit_small_patch16 = partial(MaskedAutoencoderViT, embed_dim=384, num_heads=6,
                                decoder_embed_dim=256, decoder_num_heads=8)
mae_vit_base_patch16 = partial(MaskedAutoencoderViT)
mae_vit_large_patch16 = partial(MaskedAutoencoderViT, embed_dim=1024, depth=24, num_heads=16)
mae_vit_huge_patch14 = partial(MaskedAutoencoderViT, patch_size=14, embed_dim=1280, depth=32,
                               num_heads=16)
SIZES = tuple(name for name in globals() if name.startswith("mae_vit_"))
VIT_SIZES = tuple(name.removeprefix("mae_") for name in SIZES)


def size_of(name):
    """The encoder settings of a name in VIT_SIZES; the defaults are ViT-B's."""
    vit_b = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4.0)
    return vit_b | {k: v for k, v in globals()["mae_" + name].keywords.items() if k in vit_b}


# --- the ViT it becomes
class ViT(VisionTransformer):
    """timm's ViT with MAE's initialisation: uint8 or normalised (B, 3, H, W) -> (B, classes).

    classes 0 gives features (B, D). pool: "fc_norm", a new norm of the mean of the last block's
    patch tokens (finetuning); "mean" or "cls" after the pretrained norm (features). At another
    resolution than img_size each forward resamples the one table that all stages train.
    """
    normalize = normalize

    def __init__(self, settings, img_size=224, classes=1000, pool="fc_norm", drop_path=0.0):
        super().__init__(img_size, num_classes=classes, fc_norm=pool == "fc_norm",
                         global_pool="token" if pool == "cls" else "avg", dynamic_img_size=True,
                         drop_path_rate=drop_path, norm_layer=partial(nn.LayerNorm, eps=1e-6),
                         **settings)
        self.settings = settings | {"img_size": img_size}
        init_weights(self)
        grid = count_patches(img_size, settings["patch_size"])
        self.pos_embed.data.copy_(sincos_table(settings["embed_dim"], grid))
        if classes:
            trunc_normal_(self.head.weight, std=2e-5)

    def forward(self, imgs):
        return super().forward(self.normalize(imgs))


# --- weights in and out
def read_weights(path):
    """A checkpoint's weights under official names, the settings that it tells, class names or None.

    Reads ours, official MAE's and timm's, of which only ours tell the head count. The path "none"
    gives ({}, {}, None). Raises WeightsError.
    """
    if path == "none":
        return {}, {}, None
    try:
        if str(path).endswith(".safetensors"):
            state = safetensors.torch.load_file(path)
        else:  # official checkpoints hold their command line, a Namespace
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(path, map_location="cpu", weights_only=True)
        ours = "modules" in state
        weights = state["modules"] if ours else state.get("model", state.get("state_dict", state))
        weights = {k.removeprefix("module."): v for k, v in weights.items()}
    except Exception as e:  # a damaged file can raise anything
        raise WeightsError(f"{path} cannot be read as a checkpoint: {e}.") from e
    if ours:  # beside the model's they hold the probe's
        weights = {k[6:]: v for k, v in weights.items() if k.startswith("model.")}
        return weights, dict(state["model"]), state.get("classes")
    try:
        width, _, _, patch = weights["patch_embed.proj.weight"].shape
        settings = dict(img_size=math.isqrt(weights["pos_embed"].shape[1] - 1) * patch,
                        patch_size=patch, embed_dim=width,
                        depth=len({k.split(".")[1] for k in weights if k.startswith("blocks.")}),
                        mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] / width)
    except KeyError as e:
        raise WeightsError(f"{path} holds no encoder: {e} is not in it, but {list(weights)[:4]}...")
    return weights, settings, None


def vit_settings(name, ckpt_settings, path):
    """Encoder settings from a name in VIT_SIZES or None, and a checkpoint's ({} when from scratch).

    Raises WeightsError where the two differ, in the head count too, which no shape would show.
    """
    if not name and "num_heads" in ckpt_settings:  # ours
        return {k: ckpt_settings[k] for k in size_of("vit_base_patch16")}
    candidates = [name] if name else VIT_SIZES if ckpt_settings else ["vit_base_patch16"]
    for candidate in candidates:
        size = size_of(candidate)
        mismatches = [f"{k} {ckpt_settings[k]} there, {v} here" for k, v in size.items()
                      if ckpt_settings.get(k, v) != v]
        if not mismatches:
            return size
    raise WeightsError(f"{path} is not {name or 'of a known size'}: {', '.join(mismatches)}.")


def resume(resume, last, settings, defaults, **parts):
    """The state that a run goes on from, loaded into its parts, or None. Raises WeightsError.

    resume: "auto" (from `last` if there), "none" or a path. A setting that the checkpoint does not
    know counts as its default.
    """
    path = last if resume == "auto" else resume
    if resume == "none" or (resume == "auto" and not last.exists()):
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = dict.fromkeys(settings) | defaults | state["settings"]
    except Exception as e:  # a damaged file can raise anything
        raise WeightsError(f"{path} cannot be read: {e}. --resume none starts anew.") from e
    mismatches = [f"{k}: {saved[k]} there, {v} here" for k, v in settings.items() if saved[k] != v]
    if mismatches:
        raise WeightsError(f"{path} is of a run with other settings: {'; '.join(mismatches)}. Give "
                           "the same, another --output-dir, or --resume none to start over.")
    for name, part in parts.items():
        try:
            part.load_state_dict(state.pop(name))  # not kept twice
        except (KeyError, RuntimeError, ValueError) as e:
            raise WeightsError(f"{path}, {name}: {e}. --resume none starts anew.") from e
    return state


def load_into(model, weights, path, fresh=()):
    """Loads weights into a model, the position table resampled to its size.

    fresh: prefixes of what keeps its new values. An unused decoder, head or norm is left out; a
    finetuned fc_norm stands in for a missing norm. Raises WeightsError that names what is wrong.
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
        raise WeightsError(f"{path} does not fit the model. {' '.join(str(e).split())}") from e


def init_from(model, name, path):
    """Starts mae_{name} from a checkpoint -> whether its decoder fitted too. WeightsError."""
    weights, ckpt_settings, _ = read_weights(path)
    vit_settings(name, ckpt_settings, path)
    own = model.state_dict()
    weights |= {k: own[k] for k in own if "pos_embed" in k}  # fixed, of this size
    decoder = [k for k in (*own, *weights) if k.startswith(("mask_token", "decoder"))]
    fits = all(k in own and k in weights and weights[k].shape == own[k].shape for k in decoder)
    fits &= ckpt_settings.get("decoder_num_heads", 0) in (0, model.settings["decoder_num_heads"])
    load_into(model, weights, path, fresh=() if fits else ("mask_token", "decoder"))
    return fits


def load_mae(path, **settings):
    """A trained MaskedAutoencoderViT in eval mode, from our checkpoint or an official MAE one.

    settings: what an official file does not tell, such as norm_pix_loss=False. WeightsError.
    """
    weights, ckpt_settings, _ = read_weights(path)
    if "decoder_embed.weight" not in weights:
        raise WeightsError(f"{path} has no decoder: it is not a masked autoencoder's.")
    if "decoder_depth" not in ckpt_settings:
        ckpt_settings |= vit_settings(None, ckpt_settings, path)
        ckpt_settings["decoder_embed_dim"] = weights["mask_token"].shape[2]
        ckpt_settings["decoder_depth"] = sum(k.startswith("decoder_blocks.") and
                                             k.endswith("norm1.weight") for k in weights)
    model = MaskedAutoencoderViT(**(ckpt_settings | settings))
    load_into(model, weights, path)
    return model.eval()


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--export-timm", nargs=2, metavar=("CHECKPOINT", "OUT"), required=True,
                   help="write the encoder of CHECKPOINT as a file that timm loads")
    p.add_argument("--num-classes", type=int, default=1000, help="of timm's model; 0: no head")
    args = p.parse_args()
    source, out = args.export_timm
    try:
        weights, _, _ = read_weights(source)
    except WeightsError as e:
        raise SystemExit(f"models_mae: {e}")
    # Without mask_token, for which timm would take it for DINOv2
    left_out = ("mask_token", "decoder") if args.num_classes else ("mask_token", "decoder", "head.")
    weights = {k: v for k, v in weights.items() if not k.startswith(left_out)}
    if len(weights.get("head.weight", ())) != args.num_classes:  # timm loads strictly
        weights["head.weight"] = torch.zeros(args.num_classes, weights["cls_token"].shape[2])
        weights["head.bias"] = torch.zeros(args.num_classes)
    torch.save(weights, out)
    pool = "avg" if "fc_norm.weight" in weights else "token"
    print(f"{out}: {len(weights)} tensors, for timm.create_model(..., global_pool={pool!r})")


if __name__ == "__main__":
    main()
