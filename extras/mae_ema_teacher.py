"""MAE that predicts the features of an averaged copy of itself (as data2vec, arXiv 2202.03555).

    python extras/mae_ema_teacher.py --demo --output-dir runs/ema_teacher

The teacher sees whole pictures. Its weights are an exponential moving average of the encoder's;
they are in the checkpoint, beside the model's. All flags are pretrain.py's; there are no pictures.
Last line: as pretrain.py's, e.g. `done: 24 epochs, loss ..., runs/ema_teacher/last.pt`
"""
import copy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import models_mae
import pretrain

MOMENTUM = 0.996  # not tuned


class MAEWithTeacher(models_mae.MaskedAutoencoderViT):
    def __init__(self, **settings):
        width = settings.get("embed_dim", 768)
        super().__init__(**(settings | dict(target_dim=width)))

    def flops_per_image(self, resolution, mask_ratio, decoder_keep=1.0, **changed):
        student = super().flops_per_image(resolution, mask_ratio, decoder_keep, **changed)
        L = (resolution // self.patch_size) ** 2
        embedding = 2 * L * 3 * self.patch_size ** 2 * self.settings["embed_dim"]
        # Training without a decoder: three times a forward pass, twice for the embedding
        encoder = super().flops_per_image(resolution, 0.0, decoder_embed_dim=0, decoder_depth=0)
        return student + (encoder - 2 * embedding) / 3 + embedding


class WithTeacher(pretrain.ModelWithProbe):
    def __init__(self, model, *args):
        super().__init__(model, *args)
        self.teacher = copy.deepcopy(model).requires_grad_(False)
        model.teach = self.teach  # a method, so that the teacher is no part of the model

    def teach(self, imgs):
        """(B, 3, H, W) -> the teacher's patch tokens (B, L, D)"""
        return self.teacher.forward_whole(imgs)[:, 1:]

    @torch.no_grad()
    def after_step(self, step):
        for average, weight in zip(self.teacher.parameters(), self.model.parameters()):
            average.lerp_(weight, 1 - MOMENTUM)


if __name__ == "__main__":
    models_mae.targets = lambda model, imgs, progress: model.teach(imgs)
    models_mae.TARGETS_ARE_PIXELS = False
    pretrain.MODEL = MAEWithTeacher
    pretrain.ModelWithProbe = WithTeacher
    pretrain.run(sys.argv[1:])
