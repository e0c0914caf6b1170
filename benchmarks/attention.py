"""What does it cost to watch the attention, beside a plain forward pass and beside eager attention? Ratios within one run.

    python benchmarks/attention.py [--sizes 224 518] [--repeats 5] [--batch 1]

The model is a ViT-B/14 with registers (DINOv2's architecture, random weights). `capture` gives the class token's row of every block and head; `eager` is the library's own
slow attention with `output_attentions=True`. The ways take turns; what is printed is the median of the ratios and their range. Memory is the peak of a fresh process for each
way, above that of a plain forward pass.
"""
import argparse, subprocess, sys, time, warnings
from dataclasses import replace
import pandas as pd, torch
from memory import peak_megabytes
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel
from transformers.utils import logging
from ssl_wikichurches.attention.capture import pooled_maps
from ssl_wikichurches.backbones.encoders import BACKBONES, Backbone

def backbone(implementation):
    "DINOv2 with registers at ViT-B size, as the registry describes it, with random weights."
    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(num_register_tokens=4, patch_size=14, image_size=518)
    model = Dinov2WithRegistersModel._from_config(config, attn_implementation=implementation)
    return model.eval().requires_grad_(False)

def ways(size):
    "Name -> function of images."
    spec = replace(BACKBONES['dinov2'], size=size)
    fused,eager = Backbone(spec, backbone('sdpa'), {}).eval(),backbone('eager')
    def by_eager(x):
        found = eager((x-fused.mean)/fused.std, output_attentions=True).attentions
        return torch.stack([a[:,:,0,5:] for a in found], 1).unflatten(-1, (spec.grid,spec.grid))
    return dict(plain=fused, capture=lambda x: pooled_maps(fused, x), eager=by_eager)

@torch.no_grad()
def seconds(f, x):
    start = time.perf_counter()
    f(x)
    return time.perf_counter()-start

@torch.no_grad()
def peak(way, size, batch):
    "Megabytes of this process after one pass."
    torch.manual_seed(1)
    ways(size)[way](torch.rand(batch, 3, size, size))
    return peak_megabytes()

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--sizes', type=int, nargs='+', default=[224,518]); p.add_argument('--repeats', type=int, default=5); p.add_argument('--batch', type=int, default=1)
    p.add_argument('--peak', help=argparse.SUPPRESS)
    a = p.parse_args()
    warnings.filterwarnings('ignore'); logging.set_verbosity_error()
    if a.peak: return print(peak(a.peak, a.sizes[0], a.batch))
    rows = []
    for size in a.sizes:
        found,x = ways(size),torch.rand(a.batch, 3, size, size)
        gap = (found['capture'](x)-found['eager'](x)).abs().max().item()
        times = pd.DataFrame([{k:seconds(f, x) for k,f in found.items()} for _ in range(a.repeats+1)]).iloc[1:] # the first is a warm-up
        run = lambda way: float(subprocess.run([sys.executable, __file__, '--peak', way, '--sizes', str(size), '--batch', str(a.batch)], capture_output=True, text=True, check=True).stdout.split()[-1])
        memory = {k:run(k) for k in found}
        for way in ('capture','eager'):
            ratio = times[way]/times.plain
            rows.append(dict(size=size, way=way, times_plain=ratio.median(), least=ratio.min(), most=ratio.max(), extra_MB=memory[way]-memory['plain'], peak_MB=memory[way], largest_difference=gap))
    print(pd.DataFrame(rows).set_index(['size','way']).round(dict(times_plain=3, least=3, most=3, extra_MB=0, peak_MB=0)).to_string())

if __name__=='__main__': main()
