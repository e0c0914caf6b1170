"""What only a GPU can show, in one go of a few minutes: exactness of capture, metrics, speed, memory, resuming, and two runs on one device.

    python benchmarks/gpu.py [--minutes 6] [--toy] [--only capture,resume] [--out results.json]

On a machine with a GPU it takes a ViT-B with random weights at 224 pixels, and needs no network. Without a GPU, or with `--toy`, the same checks run with a tiny backbone at 32 pixels: that shows that
they run, and no speed. A check that has not begun when the time is nearly over is left out and said to be. The exit status is 1 if something that must hold does not.
"""
import argparse, json, sys, tempfile, time
from dataclasses import replace
from pathlib import Path
import torch
from training import full_by_trainer, lora_by_trainer
from ssl_wikichurches.attention.capture import pooled_maps
from ssl_wikichurches.attention.scores import score_maps
from ssl_wikichurches.backbones.encoders import Backbone, build_architecture, load_backbone, transformers_architecture
from ssl_wikichurches.backbones.registry import BACKBONES
from ssl_wikichurches.data.download import load_churches
from ssl_wikichurches.data.files import worker_pool
from ssl_wikichurches.data.splits import make_split
from ssl_wikichurches.finetune.full import FullRecipe, fit_full
from ssl_wikichurches.finetune.lora import LoraRecipe, fit_lora
from ssl_wikichurches.finetune.training import StyleModel, TrainData, new_classifier, train
from ssl_wikichurches.study.costs import Meter, processor

def encoder(toy):
    "A DINOv2 with registers: tiny and pretrained, or of the size of a ViT-B, with weights drawn by seed."
    if toy: return load_backbone('tiny-dinov2', size=32)
    from transformers import AutoConfig
    spec = BACKBONES['dinov2']
    torch.manual_seed(0)
    architecture = transformers_architecture(AutoConfig.for_model('dinov2_with_registers', image_size=spec.size, patch_size=spec.patch, num_register_tokens=4))
    return Backbone(replace(spec, source='random'), build_architecture(architecture), architecture).eval()

def photographs(toy, size, workers=0):
    churches = load_churches('synthetic')
    split = make_split(churches)
    n = 24 if toy else 512
    return TrainData(churches, replace(split, train=(split.train*8)[:n] if not toy else split.train[::len(split.train)//n][:n], val=split.val[:8], eval=split.eval[:8]), size, workers=workers)

def eager_maps(backbone, x):
    "The row of the class token, as the library computes it when it computes whole matrices."
    backbone.model.set_attn_implementation('eager')
    try:
        with torch.no_grad(): found = backbone.model(**backbone._inputs(x), output_attentions=True).attentions
    finally: backbone.model.set_attn_implementation('sdpa')
    n,g = backbone.spec.n_prefix,backbone.spec.grid
    return torch.stack([a[:,:,0,n:].float().unflatten(-1, (g,g)) for a in found], 1)

def capture(toy, device):
    "Captured attention against eager attention: largest difference."
    x = torch.rand(4 if toy else 16, 3, *[encoder(toy).spec.size]*2, generator=torch.Generator().manual_seed(0)).to(device)
    for dtype,limit in ((torch.float32,1e-5), (torch.bfloat16,2e-2)):
        backbone = encoder(toy).to(device)
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype!=torch.float32): differ = (pooled_maps(backbone, x)-eager_maps(backbone, x)).abs().max().item()
        yield f'capture against eager, {dtype}', differ, differ<limit

def metrics(toy, device):
    "Every metric on the device against the CPU."
    maps = torch.rand(4 if toy else 24, 2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    boxes = [torch.tensor([[4.+i,6,40,50]]) for i in range(len(maps))]
    one,two = (score_maps(m, boxes, [f'Q{i}_wd0.jpg' for i in range(len(maps))], 64) for m in (maps, maps.to(device)))
    differ = (one.value-two.value).abs().groupby(one.metric).max()
    yield f'{len(differ)} metrics against the CPU: largest difference ({differ.idxmax()})', differ.max(), bool(differ.max()<1e-4 and (one.drop(columns=['value','chance','ceiling'])==two.drop(columns=['value','chance','ceiling'])).all(axis=None))

def seconds(f):
    if torch.cuda.is_available(): torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.perf_counter()-start

def speed(toy, device):
    "Steps per second of LoRA and of full fine-tuning, beside `Trainer` with the same model and batches."
    data = photographs(toy, encoder(toy).spec.size)
    for name,recipe,fit,other in (('lora',LoraRecipe(epochs=1, batch=8 if toy else 64),fit_lora,lora_by_trainer), ('full',FullRecipe(epochs=1, batch=8 if toy else 64),fit_full,full_by_trainer)):
        steps = data.steps(recipe)
        mine,theirs = seconds(lambda: fit(encoder(toy), data, recipe, 0, device)),seconds(lambda: other(encoder(toy), data, recipe))
        yield f'{name}: steps per second', steps/mine, True
        yield f'{name}: as many times as fast as Trainer', theirs/mine, True

def compiled(toy, device):
    "What `torch.compile` gives after its first epoch."
    if toy: yield 'torch.compile', 'left out: it says nothing at toy size', True; return
    data,rate = photographs(toy, encoder(toy).spec.size, 8),{}
    for c in (False, True): rate[c] = fit_full(encoder(toy), data, FullRecipe(epochs=2, batch=64, precision='bfloat16', compiled=c), 0, device).history.images_per_second.iloc[-1]
    yield 'full, bf16: images per second', rate[False], True
    yield 'full, bf16, torch.compile: images per second', rate[True], True

def loaders(toy, device):
    "Images per second of a LoRA training by processes that decode, and peak memory."
    for workers in ((0,1) if toy else (0,4,8)):
        meter,data = Meter(device),photographs(toy, encoder(toy).spec.size, workers)
        rate = fit_lora(encoder(toy), data, LoraRecipe(epochs=1 if toy else 2, batch=8 if toy else 64), 0, device).history.images_per_second.iloc[-1]
        found = meter.read()
        yield f'lora, {workers} loaders: images per second', rate, True
        yield f'lora, {workers} loaders: peak memory in MB', found.get('peak_gpu_memory', found['peak_memory'])/2**20, True

def resume(toy, device):
    "A training that was interrupted after an epoch, against one that was not."
    recipe = FullRecipe(epochs=2, batch=8 if toy else 64)
    def weights(folder=None, stop=False):
        data,model = photographs(toy, encoder(toy).spec.size),StyleModel(encoder(toy), new_classifier(encoder(toy).dim)).to(device)
        seen = []
        def mode():
            seen.append(1)
            if stop and len(seen)==2: raise KeyboardInterrupt
            model.train()
        train(model, [dict(params=model.parameters(), lr=1e-4)], data.loaders(recipe, 0), recipe, 0, device, folder, mode)
        return torch.cat([p.detach().flatten().cpu() for p in model.parameters()])
    with tempfile.TemporaryDirectory() as tmp:
        try: weights(tmp, stop=True)
        except KeyboardInterrupt: pass
        differ = (weights(tmp)-weights()).abs().max().item()
    yield 'resumed against undisturbed: largest difference of a weight', differ, differ==0 if device=='cpu' else differ<1e-4

def one_training(toy, device, seed):
    fitted = fit_lora(encoder(toy), photographs(toy, encoder(toy).spec.size), LoraRecipe(epochs=1 if toy else 2, batch=8 if toy else 64), seed, device)
    return fitted.classifier.weight.detach().cpu()

def together(toy, device):
    "Two runs at a time on one device: their time against one after the other, and their numbers."
    with worker_pool(2) as pool:
        [f.result() for f in [pool.submit(one_training, toy, device, 9) for _ in range(2)]] # both processes have loaded all they need
        alone = pool.submit(one_training, toy, device, 0).result()
        single = seconds(lambda: pool.submit(one_training, toy, device, 0).result())
        found = []
        both = seconds(lambda: found.extend(f.result() for f in [pool.submit(one_training, toy, device, s) for s in (0,1)]))
    yield 'two runs at once: throughput against one', 2*single/both, True
    differ = (found[0]-alone).abs().max().item()
    yield 'two runs at once: largest difference of a weight', differ, differ<1e-3

CHECKS = capture,metrics,speed,compiled,loaders,resume,together

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--minutes', type=float, default=6); p.add_argument('--toy', action='store_true'); p.add_argument('--out')
    p.add_argument('--only', default=','.join(c.__name__ for c in CHECKS), help='checks, with commas')
    args,start,rows = p.parse_args(),time.time(),[]
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    toy = args.toy or device=='cpu'
    print(f"{processor(device)}; {'tiny backbone, no figures of speed are meant' if toy else 'ViT-B'}", flush=True)
    for check in [c for c in CHECKS if c.__name__ in args.only.split(',')]:
        if time.time()-start>60*args.minutes*.8: rows.append((check.__name__, 'left out: no time', True)); continue
        if device=='cuda': torch.cuda.empty_cache()
        for row in check(toy, device):
            rows.append(row)
            print(f"{'ok    ' if row[2] else 'WRONG '} {row[0]:<70} {row[1] if isinstance(row[1], str) else f'{row[1]:.4g}'}", flush=True)
    if args.out: Path(args.out).write_text(json.dumps(dict(processor=processor(device), toy=toy, rows=[(a, b if isinstance(b, str) else float(b), bool(c)) for a,b,c in rows]), indent=1))
    print(f'{time.time()-start:.0f} s')
    sys.exit(not all(r[2] for r in rows))

if __name__=='__main__': main()
