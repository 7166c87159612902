"""Draws where a trained encoder looks: the attention of the class token in the last block.

    python extras/attention_maps.py runs/demo/last.pt data/demo_val.beton

A row is a picture and a map for each head: white is the patch that the class token takes most from.
To use tensors instead of a picture, import attention_maps. Last line:
    written: attention.png, 8 pictures, 4 heads
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from essl_loader import DataError, open_loader
from models_mae import WeightsError, load_mae


@torch.no_grad()
def attention_maps(mae, images):
    """images (B, 3, H, W) -> what each patch has of the class token's attention (B, heads, h, w)"""
    attn = mae.blocks[-1].attn
    seen = []
    hook = attn.register_forward_hook(lambda module, args, out: seen.append(module.qkv(args[0])))
    mae.tokens(images)
    hook.remove()
    q, k, _ = seen[0].unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT * attn.scale).softmax(dim=-1)  # (B, heads, 1 + L, 1 + L)
    return weights[:, :, 0, 1:].unflatten(2, mae.grid_of(images))


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", help="a checkpoint of pretraining, as load_mae takes it")
    p.add_argument("data", help="a .beton file or a folder of pictures")
    p.add_argument("--pictures", type=int, default=8, help="how many (default: 8)")
    p.add_argument("--out", default="attention.png",
                   help="the picture to write; an older one is replaced (default: attention.png)")
    args = p.parse_args()
    mae = load_mae(args.checkpoint)
    loader = open_loader(args.data, args.pictures, train=False, res=mae.settings["img_size"])
    images, _ = next(iter(loader))  # uint8 (B, 3, H, W)
    maps = attention_maps(mae, images)
    maps = maps / maps.amax(dim=(2, 3), keepdim=True)
    maps = F.interpolate(maps, images.shape[2:])[:, :, None] * 255  # (B, heads, 1, H, W)
    rows = torch.cat([images[:, None], maps.byte().expand(-1, -1, 3, -1, -1)], dim=1)
    B, columns, _, H, W = rows.shape
    canvas = rows.permute(0, 3, 1, 4, 2).reshape(B * H, columns * W, 3)
    Image.fromarray(canvas.numpy()).save(args.out)
    print(f"written: {args.out}, {B} pictures, {columns - 1} heads")


if __name__ == "__main__":
    try:
        main()
    except (DataError, WeightsError, OSError) as e:
        raise SystemExit(f"attention_maps: {e}")
