"""How an image meets its bucket: scaled to cover it, a rectangle cut out, mirrored or not."""

from dataclasses import dataclass

SizeIds = tuple[int, int, int, int, int, int]  # original height and width, crop top and left, target height and width


@dataclass(frozen=True)
class Fit:
    """How an image meets its bucket: scaled to scaled_wh_px, the bucket's rectangle cut out at crop_xy_px, mirrored."""

    scaled_wh_px: tuple[int, int]
    crop_xy_px: tuple[int, int]
    mirrored: bool = False

    def seen_left_px(self, bucket_w_px: int) -> int:
        """How much is cropped away left of what is seen: of a mirrored image, what was right of it before."""
        left = self.crop_xy_px[0]
        return self.scaled_wh_px[0] - bucket_w_px - left if self.mirrored else left
