"Backbones for photographs of 64 pixels: a training costs a third of what it costs with 96. Who takes `SIDE` from here gets `data` of that size."
from functools import partial
from ssl_wikichurches.backbones import encoders

SIDE = 64
load_backbone = partial(encoders.load_backbone, size=SIDE)
