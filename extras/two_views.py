"""MAE with a contrastive loss (InfoNCE) between two masked crops of each picture.

    python extras/two_views.py --demo --output-dir runs/two_views

It shows how to load two views, add modules with their own loss, and log more numbers. All flags are
pretrain.py's. Last line: as pretrain.py's, e.g. `done: 24 epochs, loss ..., runs/two_views/last.pt`
"""
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pretrain
from essl_loader import open_loader

WEIGHT = 0.1  # of the contrastive loss, not tuned
TEMPERATURE = 0.1


class TwoViews(pretrain.ModelWithProbe):
    def __init__(self, model, *args):
        super().__init__(model, *args)
        width = model.settings["embed_dim"]
        self.projector = nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Linear(256, 64))

    def forward(self, images, labels, mask_ratio, noise):
        """images (2, B, 3, H, W), labels (B,), noise (B, L) -> {name: scalar}."""
        images = images.flatten(0, 1)  # (2 B, 3, H, W)
        noise = torch.cat([noise, noise.flip(1)])  # another mask for the second view
        mae_loss, _, _, latent = self.model(images, mask_ratio, noise, self.decoder_keep,
                                            return_latent=True)
        features = F.normalize(self.projector(latent[:, 1:].mean(dim=1)), dim=1)  # (2 B, 64)
        first, second = features.chunk(2)
        scores = first @ second.T / TEMPERATURE  # (B, B)
        own = torch.arange(len(scores), device=scores.device)
        contrast = F.cross_entropy(scores, own)
        return {"loss": mae_loss + WEIGHT * contrast, "mae": mae_loss, "contrast": contrast,
                **self.probe_loss(images, labels.repeat(2), latent)}


def open_two_views(path, batch_size, train=True, **options):
    """The training set with two crops of each picture; the held-out set as it is."""
    views = 2 if train else 1
    return open_loader(path, batch_size, train, views=views, **options)


if __name__ == "__main__":
    pretrain.open_loader = open_two_views
    pretrain.ModelWithProbe = TwoViews
    pretrain.run(sys.argv[1:])
