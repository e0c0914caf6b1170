"""What does it cost to score every block and head at once, beside one map at a time? Ratios within one run.

    python benchmarks/metrics.py [--images 3] [--blocks 12] [--heads 12] [--size 224] [--patch 16] [--sample 6] [--repeats 3]

`score_measures` scores all maps of a few made-up images by every measure; `plain` scores a sample of the same maps, each by itself, with numpy, scipy, scikit-learn and POT as anyone would, without a
line of this package but `upsample`. Seconds are per map; what is printed is the median of the ratios, their range, the largest difference of any value, and the peak memory of a fresh process for three
sizes of the engine's work space, above that of one which scores nothing.
"""
import argparse, subprocess, sys, time
import numpy as np, ot, pandas as pd, torch
from memory import peak_megabytes
from scipy.ndimage import distance_transform_edt
from sklearn.metrics import average_precision_score, jaccard_score, roc_auc_score
from ssl_wikichurches.data import box_mask
from ssl_wikichurches.measures import BYTES_PER_PIXEL, EPS, PRIOR_EPS, score_measures
from ssl_wikichurches.metrics import upsample

def top(flat, k):
    kept = np.zeros(flat.size, bool)
    kept[np.argsort(-flat, kind='stable')[:k]] = True
    return kept

def plain(heat, pixels, mask, parts, rest, cost):
    "Every measure of one map: `heat` on patches, `pixels` upsampled; `rest`: masks of the other images."
    a,h,m,n = pixels.astype(float).ravel(),heat.astype(float).ravel(),mask.ravel(),mask.size
    p,h,k = a/a.sum(),h/h.sum(),round(n/10)
    g,s = heat.shape[0],mask.shape[0]//heat.shape[0]
    t = mask.reshape(g,s,g,s).sum((1,3)).ravel()/mask.sum()
    others = np.mean([r/r.sum() for r in rest], 0).ravel()
    mass = int((np.cumsum(np.sort(p)[::-1])<.6-1e-9).sum())+1
    first,best = top(a, k),top(a, m.sum())
    score = np.r_[a[m],a]
    return {'iou@area': jaccard_score(m, best), 'rank_accuracy': best[m].mean(), 'mass_iou@60': jaccard_score(m, top(a, mass)), 'average_precision': average_precision_score(m, a),
            'pointing@0': np.mean((distance_transform_edt(~mask)<=0).ravel()[a==a.max()]), 'nss': ((a-a.mean())/a.std())[m].mean(),
            'shuffled_auroc': roc_auc_score(np.r_[np.ones(m.sum()),np.zeros(n)], score, sample_weight=np.r_[np.ones(m.sum()),others]),
            'information_gain': (np.log2((1-EPS)*p+EPS/n)-np.log2((1-PRIOR_EPS)*others+PRIOR_EPS/n))[m].mean(),
            'kl': (t[t>0]*np.log(t[t>0]/((1-EPS)*h+EPS/h.size)[t>0])).sum(), 'similarity': np.minimum(h, t).sum(), 'correlation': np.corrcoef(h, t)[0,1], 'emd': ot.emd2(h, t, cost, numItermax=1_000_000),
            'recall@90': np.mean([first[b.ravel()].mean() for b in parts]), 'best_iou@90': max(jaccard_score(b.ravel(), first) for b in parts), 'best_coverage': max(p[b.ravel()].sum() for b in parts)}

def peak(a):
    "MiB of this process after two images have been scored within `a.peak` bytes; 0: nothing is scored."
    maps,masks,boxes,names = made(a)
    if a.peak: score_measures(maps[:2,:8], masks[:2], boxes[:2], names[:2], memory=a.peak)
    return peak_megabytes()

def made(a):
    "Maps, masks, boxes and names."
    r = torch.Generator().manual_seed(0)
    corner = torch.rand(a.images, 4, 2, generator=r)*.7*a.size
    boxes = list(torch.cat([corner, corner+(.05+.2*torch.rand(a.images, 4, 2, generator=r))*a.size], -1))
    g = a.size//a.patch
    return torch.rand(a.images, a.blocks, a.heads, g, g, generator=r)**4, torch.stack([box_mask(b, a.size) for b in boxes]), boxes, [f'image {i}' for i in range(a.images)]

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name,default in dict(images=3, blocks=12, heads=12, size=224, patch=16, sample=6, repeats=3).items(): p.add_argument(f'--{name}', type=int, default=default)
    p.add_argument('--peak', type=int, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.peak is not None: return print(peak(a))
    maps,masks,boxes,names = made(a)
    at = (np.stack(np.divmod(np.arange(maps.shape[-1]**2), maps.shape[-1]), 1)+.5)/maps.shape[-1]
    cost = np.linalg.norm(at[:,None]-at, axis=-1)
    chosen = [(i,int(b),int(h)) for i in range(a.images) for b,h in np.random.default_rng(i).integers(0, (a.blocks,a.heads), (a.sample,2))]
    grids = {i:(maps[i].numpy(), upsample(maps[i], a.size).numpy()) for i in range(a.images)}
    run = lambda memory: float(subprocess.run([sys.executable, __file__, '--peak', str(memory), *sys.argv[1:]], capture_output=True, text=True, check=True).stdout.split()[-1])
    one = BYTES_PER_PIXEL*a.size**2
    nothing = run(0)
    for memory in (one,2**27,2**29): print(f'memory={memory/2**20:.0f} MiB, {memory//one} maps at once: peak {run(memory)-nothing:.0f} MiB above a process that scores nothing')
    times,worst = [],{}
    for _ in range(a.repeats):
        start = time.perf_counter()
        table = score_measures(maps, masks, boxes, names)
        engine = (time.perf_counter()-start)/(a.images*a.blocks*(a.heads+1))
        start = time.perf_counter()
        found = {(i,b,h): plain(grids[i][0][b,h], grids[i][1][b,h], masks[i].numpy(), [box_mask(x[None], a.size).numpy() for x in boxes[i]], [masks[j].numpy() for j in range(a.images) if j!=i], cost) for i,b,h in chosen}
        times.append(dict(engine=engine, plain=(time.perf_counter()-start)/len(found)))
    value = table.set_index(['image','block','head','metric']).sort_index().value
    for (i,b,h),scores in found.items():
        for k,v in scores.items(): worst[k] = max(worst.get(k, 0), abs(value[names[i],b,str(h),k]-v))
    times = pd.DataFrame(times); ratio = times.plain/times.engine
    print(f'{len(found)} maps by hand, {a.images*a.blocks*(a.heads+1)} by the engine; ms per map: engine {1e3*times.engine.median():.1f}, plain {1e3*times.plain.median():.1f}; '
          f'plain/engine: median {ratio.median():.2f}, from {ratio.min():.2f} to {ratio.max():.2f}')
    print(pd.Series(worst, name='largest difference').rename_axis('metric').to_string(float_format='{:.1e}'.format))
    assert max(worst.values())<1e-6, 'the two do not agree'

if __name__=='__main__': main()
