"""What does it cost to score every block and head at once, beside one map at a time? Ratios within one run.

    python benchmarks/metrics.py [--images 139] [--blocks 12] [--heads 12] [--size 224] [--patch 14] [--sample 12] [--repeats 3]
    python benchmarks/metrics.py --single 1 20 200 # one map an image, on one thread: the earlier way beside that of `score_maps`
    git worktree add /tmp/before COMMIT; python benchmarks/metrics.py --single 1 20 200 1000 --against /tmp/before # and that of another state of the repository

`score_maps` scores all maps of made-up images by every metric; `plain` scores a sample of the same maps, each by itself, with numpy, scipy and scikit-learn as anyone would, without a line of this package but
`upsample` and `box_mask`. Its earth mover's distance is `scipy.stats.wasserstein_distance_nd`, by far its slowest part, so the ratio is printed without it, too. Seconds are per map: the plain code does not gain from having more of
them. What is printed is the median of the ratios and their range, the largest difference of any value, and the peak memory of a fresh process for three sizes of the engine's work space, above that of one
which scores nothing. With `--single` it is milliseconds of processor time for an image with one map, of all metrics and of the IoU at the 90th percentile: `earlier` pays for
each image what `score_maps` did when its levels, masks and checks were made for many maps an image. With `--against` another state of the repository scores the same maps in a process of its own, in turn with this one;
`before` is its time, and what is compared is its table. With `--many` both score that many maps an image, too. scipy's solver stops within 1e-7 of the optimum, so the distances of the sample are solved again by HiGHS at its tightest tolerance.
"""
import argparse, json, os, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np, pandas as pd, torch
from memory import peak_megabytes
from scipy.ndimage import distance_transform_edt
from scipy.optimize import linprog
from scipy.sparse import identity, kron, vstack
from scipy.stats import wasserstein_distance_nd
from sklearn.metrics import average_precision_score, jaccard_score, roc_auc_score
from ssl_wikichurches.data.churches import box_mask
from ssl_wikichurches.attention.saliency_metrics import EPS, PRIOR_EPS, average_precision_chance, dilate, emd, loo_prior, mix_even, soft_target
from ssl_wikichurches.attention.metrics import upsample
from ssl_wikichurches.attention.scores import BYTES_PER_PIXEL, score_maps

def top(flat, k):
    kept = np.zeros(flat.size, bool)
    kept[np.argsort(-flat, kind='stable')[:k]] = True
    return kept

def pooled(mask, g):
    s = mask.shape[0]//g
    return mask.reshape(g,s,g,s).sum((1,3)).ravel()/mask.sum()

def plain(heat, pixels, mask, parts, others):
    "Every metric of one map but the earth mover's distance: `heat` on patches, `pixels` upsampled; `others`: density of the other images' boxes."
    a,h,m,n = pixels.astype(float).ravel(),heat.astype(float).ravel(),mask.ravel(),mask.size
    p,h,k,t = a/a.sum(),h/h.sum(),round(n/10),pooled(mask, heat.shape[0])
    mass = int((np.cumsum(np.sort(p)[::-1])<.6-1e-9).sum())+1
    first,best = top(a, k),top(a, m.sum())
    return {f'iou@{q}': jaccard_score(m, top(a, round(n*(100-q)/100))) for q in range(50,100,5)}|{'coverage': p[m].sum(), 'lift': p[m].sum()/m.mean(), 'auroc': roc_auc_score(m, a),
            'iou@area': jaccard_score(m, best), 'rank_accuracy': best[m].mean(), 'mass_iou@60': jaccard_score(m, top(a, mass)), 'average_precision': average_precision_score(m, a),
            'pointing@0': np.mean((distance_transform_edt(~mask)<=0).ravel()[a==a.max()]), 'nss': ((a-a.mean())/a.std())[m].mean(),
            'shuffled_auroc': roc_auc_score(np.r_[np.ones(m.sum()),np.zeros(n)], np.r_[a[m],a], sample_weight=np.r_[np.ones(m.sum()),others]),
            'information_gain': (np.log2((1-EPS)*p+EPS/n)-np.log2((1-PRIOR_EPS)*others+PRIOR_EPS/n))[m].mean(),
            'kl': (t[t>0]*np.log(t[t>0]/((1-EPS)*h+EPS/h.size)[t>0])).sum(), 'similarity': np.minimum(h, t).sum(), 'correlation': np.corrcoef(h, t)[0,1],
            'recall@90': np.mean([first[b.ravel()].mean() for b in parts]), 'best_iou@90': max(jaccard_score(b.ravel(), first) for b in parts), 'best_coverage': max(p[b.ravel()].sum() for b in parts)}

def distance_of(heat, mask, at):
    "The earth mover's distance as scipy has it."
    h = heat.astype(float).ravel()
    return wasserstein_distance_nd(at, at, h/h.sum(), pooled(mask, heat.shape[0]))

def tight(heat, mask, at):
    "The same as a sparse linear program, solved to 1e-10."
    h = heat.astype(float).ravel(); p,t = h/h.sum(),pooled(mask, heat.shape[0])
    n,cost = len(p),np.linalg.norm(at[:,None]-at, axis=-1)
    rows = vstack([kron(identity(n), np.ones((1,n))), kron(np.ones((1,n)), identity(n))]).tocsr()[:-1] # the last follows from the others
    return linprog(cost.ravel(), A_eq=rows, b_eq=np.r_[p,t][:-1], method='highs-ds', options=dict(presolve=False, primal_feasibility_tolerance=1e-10, dual_feasibility_tolerance=1e-10)).fun

# ---- one map an image, as it was: torch throughout, one box at a time, levels as scores of even attention and of the target

def sorted_before(pixels):
    keys = ((~((b := (pixels.flatten()+0.).view(torch.int32))^((b>>31)&0x7fffffff))).long()<<32)|torch.arange(pixels.numel())
    keys = torch.from_numpy(np.sort(keys.numpy()))
    return keys&0xffffffff,pixels.flatten()[keys&0xffffffff]

def places_before(order, values, mask):
    hit = mask.flatten().take(order); at = hit.nonzero()[:,0]
    new = torch.ones_like(order, dtype=torch.bool); new[1:] = values[1:]!=values[:-1]
    begins = torch.cat([new.nonzero()[:,0], order.new_tensor([len(order)])])
    run = new.cumsum(0, dtype=torch.int32).take(at).long()
    first,last = begins[run-1],begins[run]-1
    return at,first,last,hit.cumsum(0, dtype=torch.int32).take(last).long()

def chance_before(area, n, k, f):
    mean = k*area/n; far = 14*(mean*(1-area/n)*(1-k/n)*n/(n-1))**.5+20
    x = np.arange(max(0, k+area-n, int(mean-far)), min(k, area, int(mean+far)+1)+1); choose = lambda n, k: f[n]-f[k]-f[n-k]
    return float((np.exp(choose(area, x)+choose(n-area, k-x)-choose(n, k))*(x/(k+area-x))).sum())

def best_box_before(masks, k, draws=1000):
    m = masks.flatten(1).numpy()
    _,one,counts = np.unique(np.packbits(m, axis=0), axis=1, return_index=True, return_counts=True)
    hits = np.random.default_rng(0).multivariate_hypergeometric(counts, k, size=draws, method='marginals')@m[:,one].T.astype(int)
    return float((hits/(k+m.sum(1)-hits)).max(1).mean())

def share_before(x):
    flat = x.flatten().double(); low,high = torch.aminmax(flat); assert low.isfinite() and high.isfinite() and low>=0
    return flat/flat.sum()

def shuffled_before(others, mask, order, places):
    at,first,last,_ = places; w = others.flatten().take(order); above = w.cumsum(0)
    return 1-((above[last]+above[first]-w[first])/2/above[-1]).mean().item()

def nss_before(x, within):
    flat = x.flatten().double(); off = flat-flat.mean(); return (off/off.square().mean().sqrt())[within].mean().item()

def correlation_before(x, t):
    z = [(v.flatten().double()-v.double().mean())/v.double().var(correction=0).sqrt() for v in (x, t)]; return (z[0]*z[1]).mean().nan_to_num().item() # nothing correlates with what is even

def patches_before(x, t):
    p,q = share_before(x),t.flatten(); mixed = (1-EPS)*p+EPS/len(p)
    return dict(kl=(torch.special.xlogy(q, q)-torch.special.xlogy(q, mixed)).sum().item(), similarity=torch.minimum(p, q).sum().item(), correlation=correlation_before(x, t), emd=emd(x, t).item())

def earlier(heat, boxes, size, others, f, only):
    "full name -> value, chance and ceiling of one map (g, g); `others`: (s, s) density of the other images' boxes; `f`: logarithms of factorials."
    masks = torch.stack([box_mask(b[None], size) for b in boxes]); mask = masks.any(0); pixels = upsample(heat, size); n,area = mask.numel(),int(mask.sum())
    order,values = sorted_before(pixels); places = at,first,last,upto = places_before(order, values, mask)
    iou = lambda k: ((h := int((at<k).sum()))/(k+area-h),chance_before(area, n, k, f),min(k, area)/max(k, area))
    if only: return {'iou@90':iou(round(n/10))}
    within = mask.flatten().nonzero()[:,0]; k = round(n/10); p = share_before(pixels); r = int((at<area).sum())/area; covered = p[within].sum().item()
    held = int((share_before(values).cumsum(0)<.6-1e-9).sum())+1; rare = (2-others/others.max())*mask; top = order[:k]
    hits = torch.stack([m.take(top).sum() for m in masks.flatten(1)]).double(); areas = masks.flatten(1).sum(1).double(); worth = (masks.flatten(1).double()/areas[:,None]).mean(0)
    prior = mix_even(others.flatten(), PRIOR_EPS); gain = lambda q: (((1-EPS)*q+EPS/n)[within].log2()-prior[within].log2()).mean().item()
    t = soft_target(mask, len(heat)); even = patches_before(torch.ones_like(t), t); own = patches_before(t, t); v,o = rare.flatten().sort(descending=True, stable=True); peak = pixels==pixels.amax()
    above = (first+last).double().mean().item()/2
    return {f'iou@{q}':iou(round(n*(100-q)/100)) for q in range(50,100,5)}|{'iou@area':(r/(2-r),chance_before(area, n, area, f),1), 'rank_accuracy':(r,area/n,1), 'auroc':(1-(above-(area-1)/2)/(n-area),.5,1),
        'average_precision':((upto.double()/(last+1)).mean().item(),average_precision_chance(area, n),1), 'nss':(nss_before(pixels, within),0,((n-area)/area)**.5), 'coverage':(covered,area/n,1), 'lift':(covered*n/area,1,n/area),
        'shuffled_auroc':(shuffled_before(others, mask, order, places),.5,shuffled_before(others, mask, o, places_before(o, v, mask))), 'mass_iou@60':iou(held), 'information_gain':(gain(p),gain(torch.full_like(p, 1/n)),gain(share_before(mask))),
        'pointing@0':((peak&mask).sum().item()/peak.sum().item(),dilate(mask, 0).double().mean().item(),1), 'recall@90':((hits/areas).mean().item(),k/n,worth.topk(k).values.sum().item()),
        'best_iou@90':((hits/(k+areas-hits)).max().item(),best_box_before(masks, k),(areas.clamp(max=k)/areas.clamp(min=k)).max().item()),
        'best_coverage':(max(p[m.flatten().nonzero()[:,0]].sum().item() for m in masks),areas.max().item()/n,1)}|{m:(s,even[m],own[m]) for m,s in patches_before(heat, t).items()}

def case(a, images, maps=1):
    "Maps, boxes and names; two images where one is asked for, because some metrics need others."
    m,boxes,names = made(argparse.Namespace(**vars(a)|dict(images=images, blocks=1, heads=1)|(dict(blocks=a.blocks, heads=a.heads) if maps>1 else {})))
    m = m if maps>1 else m[:,0,0]
    return (m,boxes,names) if images>1 else (torch.cat([m, m]),boxes*2,['image 0','beside it'])

def served(a):
    "For each case on the standard input, the processor seconds of scoring it; the table goes to the path beside it."
    torch.set_num_threads(1)
    for line in sys.stdin:
        images,maps,only,path = json.loads(line); m,boxes,names = case(a, images, maps)
        table,seconds = processor(lambda: score_maps(m, boxes, names, a.size, only=only))
        if path: table.to_pickle(path)
        print(seconds, flush=True)

def server(a, folder):
    "A process that scores cases by the package in a folder, as a function."
    command = [sys.executable, __file__, '--serve', *(x for k in ('size','patch','blocks','heads') for x in (f'--{k}',str(getattr(a, k))))]
    process = subprocess.Popen(command, env=os.environ|dict(PYTHONPATH=str(folder)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    def ask(*what):
        print(json.dumps(what), file=process.stdin, flush=True)
        return float(process.stdout.readline())
    return ask

def versus(a):
    "Milliseconds of processor time a map by another state of the repository and by this one, in turn, and the largest difference of a value or a level."
    before,now = server(a, a.against),server(a, Path(__file__).parents[1]); rows = []
    with tempfile.TemporaryDirectory() as folder:
        paths = [f'{folder}/{k}' for k in ('before','now')]
        for images,maps,only in [(i,1,o) for i in a.single for o in ([],['iou@90'])]+[(i,a.blocks*(a.heads+1),[]) for i in a.many]:
            for ask,path in zip((before, now), paths): ask(images, maps, only, path)
            one,two = map(pd.read_pickle, paths); levels = ['value','chance','ceiling']
            assert one.drop(columns=levels).equals(two.drop(columns=levels))
            times = 1e3*np.array([[ask(images, maps, only, None) for ask in (before, now)] for _ in range(a.repeats)])/max(images, 2)/maps
            rows.append(dict(images=max(images, 2), maps=maps, metrics=only[0] if only else 'all', before=np.median(times[:,0]), now=np.median(times[:,1]),
                             ratio=np.median(times[:,0]/times[:,1]), lowest=times[:,1].min(), difference=np.abs(one[levels]-two[levels]).max(axis=None)))
    print(pd.DataFrame(rows).set_index(['images','maps','metrics']).round(dict(before=2, now=2, ratio=2, lowest=2)).to_string())

def single(a):
    "Milliseconds of processor time an image, the earlier way and now, and the largest difference of a value or a level."
    from scipy.special import gammaln
    torch.set_num_threads(1); f = gammaln(np.arange(a.size**2+1)+1.); rows = []
    for images in a.single:
        maps,boxes,names = case(a, images)
        for only in ([],['iou@90']):
            def before():
                masks = torch.stack([box_mask(b, a.size) for b in boxes]); others = loo_prior(masks, eps=0) if not only else [None]*len(names)
                return [earlier(m, b, a.size, o, f, only) for m,b,o in zip(maps, boxes, others)]
            def now(): return score_maps(maps, boxes, names, a.size, only=only)
            before(), now(); times = []
            for _ in range(a.repeats):
                old,t0 = processor(before); new,t1 = processor(now); times.append((t0, t1))
            row = new.set_index(['image','metric'])[['value','chance','ceiling']]
            gap = max(np.abs(row.loc[name].loc[[*found]].to_numpy()-np.array([*found.values()], dtype=float)).max() for name,found in zip(names, old))
            rows.append(dict(images=len(names), metrics=only[0] if only else 'all', earlier=1e3*np.median([t for t,_ in times])/len(names), now=1e3*np.median([t for _,t in times])/len(names),
                             ratio=np.median([x/y for x,y in times]), difference=gap))
    print(pd.DataFrame(rows).set_index(['images','metrics']).round(dict(earlier=2, now=2, ratio=1)).to_string())

def processor(f):
    start = time.process_time()
    return f(), time.process_time()-start

def made(a):
    "Maps, boxes and names."
    r = torch.Generator().manual_seed(0)
    corner = torch.rand(a.images, 4, 2, generator=r)*.7*a.size
    boxes = list(torch.cat([corner, corner+(.05+.2*torch.rand(a.images, 4, 2, generator=r))*a.size], -1))
    g = a.size//a.patch
    return torch.rand(a.images, a.blocks, a.heads, g, g, generator=r)**4, boxes, [f'image {i}' for i in range(a.images)]

def peak(a):
    "MiB of this process after eight images have been scored within `a.peak` bytes per thread; 0: nothing is scored."
    import ot # as the distance does on its first call
    maps,boxes,names = (x[:8] for x in made(a))
    if a.peak: score_maps(maps, boxes, names, a.size, memory=a.peak)
    return peak_megabytes()

def clock(f):
    start = time.perf_counter()
    return f(), time.perf_counter()-start

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name,default in dict(images=139, blocks=12, heads=12, size=224, patch=14, sample=12, repeats=3).items(): p.add_argument(f'--{name}', type=int, default=default)
    p.add_argument('--single', type=int, nargs='+', default=[], help='numbers of images with one map each'); p.add_argument('--peak', type=int, help=argparse.SUPPRESS)
    p.add_argument('--against', type=Path, help='folder of another state of the repository'); p.add_argument('--many', type=int, nargs='+', default=[], help='numbers of images with all their maps')
    p.add_argument('--serve', action='store_true', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.serve: return served(a)
    if a.against: return versus(a)
    if a.single: return single(a)
    if a.peak is not None: return print(peak(a))
    maps,boxes,names = made(a)
    masks = [box_mask(b, a.size).numpy() for b in boxes]
    density = np.stack([m.ravel()/m.sum() for m in masks])
    at = (np.stack(np.divmod(np.arange(maps.shape[-1]**2), maps.shape[-1]), 1)+.5)/maps.shape[-1]
    chosen = [(int(i),int(b),int(h)) for i,b,h in np.random.default_rng(0).integers(0, (a.images,a.blocks,a.heads), (a.sample,3))]
    def by_hand(i, b, h): return plain(maps[i,b,h].numpy(), upsample(maps[i,b,h], a.size).numpy(), masks[i], [box_mask(x[None], a.size).numpy() for x in boxes[i]], (density.sum(0)-density[i]).clip(0)/(a.images-1))
    run = lambda memory: float(subprocess.run([sys.executable, __file__, '--peak', str(memory), *sys.argv[1:]], capture_output=True, text=True, check=True).stdout.split()[-1])
    one,n = BYTES_PER_PIXEL*a.size**2,a.images*a.blocks*(a.heads+1)
    nothing = run(0)
    for memory in (one,2**26,2**29): print(f'memory={memory/2**20:.0f} MiB, {memory//one} maps at once on each of {torch.get_num_threads()} threads: peak {run(memory)-nothing:.0f} MiB above a process that scores nothing')
    times = []
    for _ in range(a.repeats):
        table,whole = clock(lambda: score_maps(maps, boxes, names, a.size))
        _,without = clock(lambda: score_maps(maps, boxes, names, a.size, only=[k for k in dict.fromkeys(table.metric) if k!='emd']))
        found,hand = clock(lambda: {c:by_hand(*c) for c in chosen})
        distances,slow = clock(lambda: {(i,b,h):distance_of(maps[i,b,h].numpy(), masks[i], at) for i,b,h in chosen})
        times.append(dict(engine=whole/n, without=without/n, plain=hand/len(found), emd=slow/len(found)))
    value,worst = table.set_index(['image','block','head','metric']).sort_index().value,{}
    for (i,b,h),scores in found.items():
        exact = {'emd (scipy)': distances[i,b,h], 'emd (HiGHS, 1e-10)': tight(maps[i,b,h].numpy(), masks[i], at)}
        for k,v in (scores|exact).items(): worst[k] = max(worst.get(k, 0), abs(value[names[i],b,str(h),k.split(' ')[0]]-v))
    times = 1e3*pd.DataFrame(times)
    print(f'{len(found)} maps by hand, {n} by the engine ({whole:.0f} s); ms per map: '+', '.join(f'{k} {v:.2f}' for k,v in times.median().items()))
    for what,r in {'all metrics': (times.plain+times.emd)/times.engine, "all but the earth mover's distance": times.plain/times.without}.items(): print(f'{what}: plain/engine {r.median():.1f}, from {r.min():.1f} to {r.max():.1f}')
    print(pd.Series(worst, name='largest difference').rename_axis('metric').to_string(float_format='{:.1e}'.format))
    assert max(v for k,v in worst.items() if 'emd' not in k)<1e-6 and worst['emd (HiGHS, 1e-10)']<1e-9, 'the two do not agree'

if __name__=='__main__': main()
