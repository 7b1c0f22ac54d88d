"""Views of decoded images: K random ones for training, one fixed one for evaluation."""

from ssl_dist.views.draw import ViewParameters
from ssl_dist.views.make import ViewSpec, draw_view, make_views, render_view, ten_crops, test_views, view_specs, warm_up
from ssl_dist.views.pixels import MAX_CHANNELS, RGB, PixelFormat
from ssl_dist.views.render import Images

__all__ = [
    "MAX_CHANNELS",
    "RGB",
    "Images",
    "PixelFormat",
    "ViewParameters",
    "ViewSpec",
    "draw_view",
    "make_views",
    "render_view",
    "ten_crops",
    "test_views",
    "view_specs",
    "warm_up",
]
