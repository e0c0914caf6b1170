"""What does it cost to watch the attention, beside a plain forward pass and beside eager attention? Ratios within one run.

    python benchmarks/attention.py [--model dinov2] [--sizes 224 518] [--repeats 5] [--batch 1]
    python benchmarks/attention.py --model siglip --sizes 224

The model is a ViT-B/14 with registers (DINOv2's architecture, random weights), or with `--model siglip` a ViT-B/16 with a pooling head. `capture` gives the class token's row of
every block and head, or the row of the pooling head; `received` what patches receive in every block and head (of SigLIP); `eager` is the library's own slow attention with
`output_attentions=True`, of which the same maps are made. The ways take turns; what is printed is the median of the ratios and their range. Memory is the peak of a fresh process for each
way, above that of a plain forward pass.
"""
import argparse, subprocess, sys, time, warnings
from dataclasses import replace
import pandas as pd, torch
from memory import peak_megabytes
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, SiglipVisionConfig, SiglipVisionModel
from transformers.utils import logging
from ssl_wikichurches.attention.capture import pooled_maps, received_maps
from ssl_wikichurches.backbones.encoders import BACKBONES, Backbone

def backbone(implementation):
    "DINOv2 with registers at ViT-B size, as the registry describes it, with random weights."
    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(num_register_tokens=4, patch_size=14, image_size=518)
    model = Dinov2WithRegistersModel._from_config(config, attn_implementation=implementation)
    return model.eval().requires_grad_(False)

def siglip_ways(size):
    "Name -> function of images, of SigLIP."
    torch.manual_seed(0)
    config = lambda: SiglipVisionConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=size, patch_size=16)
    model = {k:SiglipVisionModel._from_config(config(), attn_implementation=k).eval().requires_grad_(False) for k in ('sdpa','eager')}
    model['eager'].load_state_dict(model['sdpa'].state_dict())
    spec = replace(BACKBONES['siglip'], size=size); fused = Backbone(spec, model['sdpa'], {}).eval()
    grid = lambda rows: rows.unflatten(-1, (spec.grid,spec.grid))
    def eager_received(x): return grid(torch.stack([a.mean(2) for a in model['eager']((x-fused.mean)/fused.std, output_attentions=True).attentions], 1))
    def eager_head(x): # the head asked for its weights, in its own call
        head,rows = model['eager'].head.attention,[]
        def asked(*args, **kwargs): rows.append(type(head).forward(head, *args, **kwargs|dict(need_weights=True, average_attn_weights=False))); return rows[-1]
        head.forward = asked
        try: model['eager']((x-fused.mean)/fused.std)
        finally: del head.forward
        return grid(rows[0][1][:,:,0])[:,None]
    return dict(plain=fused, capture=lambda x: pooled_maps(fused, x), eager=eager_head, received=lambda x: received_maps(fused, x), eager_received=eager_received)

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
    start = time.process_time() # of the processor: others may be using it too
    f(x)
    return time.process_time()-start

@torch.no_grad()
def peak(make, way, size, batch):
    "Megabytes of this process after one pass."
    torch.manual_seed(1)
    make(size)[way](torch.rand(batch, 3, size, size))
    return peak_megabytes()

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--sizes', type=int, nargs='+', default=[224,518]); p.add_argument('--repeats', type=int, default=5); p.add_argument('--batch', type=int, default=1)
    p.add_argument('--model', default='dinov2', choices=('dinov2','siglip')); p.add_argument('--peak', help=argparse.SUPPRESS)
    a = p.parse_args()
    warnings.filterwarnings('ignore'); logging.set_verbosity_error()
    make = siglip_ways if a.model=='siglip' else ways
    if a.peak: return print(peak(make, a.peak, a.sizes[0], a.batch))
    rows = []
    for size in a.sizes:
        found,x = make(size),torch.rand(a.batch, 3, size, size)
        pairs = {'capture':'eager'}|({'received':'eager_received'} if 'received' in found else {})
        gap = {k:(found[k](x)-found[e](x)).abs().max().item() for k,e in pairs.items()}
        times = pd.DataFrame([{k:seconds(f, x) for k,f in found.items()} for _ in range(a.repeats+1)]).iloc[1:] # the first is a warm-up
        run = lambda way: float(subprocess.run([sys.executable, __file__, '--model', a.model, '--peak', way, '--sizes', str(size), '--batch', str(a.batch)], capture_output=True, text=True, check=True).stdout.split()[-1])
        memory = {k:run(k) for k in found}
        for way in [w for pair in pairs.items() for w in pair]:
            ratio,against = times[way]/times.plain,pairs.get(way)
            rows.append(dict(size=size, way=way, times_plain=ratio.median(), least=ratio.min(), most=ratio.max(), eager_over_this=(times[against]/times[way]).median() if against else 1.,
                             extra_MB=memory[way]-memory['plain'], peak_MB=memory[way], largest_difference=gap.get(way, 0.)))
    print(pd.DataFrame(rows).set_index(['size','way']).round(dict(times_plain=3, least=3, most=3, eager_over_this=3, extra_MB=0, peak_MB=0)).to_string())

if __name__=='__main__': main()
