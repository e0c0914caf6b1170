"""What do the sign-flip tests and BCa intervals of a whole family cost, beside scipy's for one comparison at a time? Ratios within one run.

    python benchmarks/paired_tests.py [--comparisons 12] [--churches 139] [--resamples 9999] [--repeats 7]

Made-up shifts (`draw_shifts`). `max_t` flips the signs of churches for all comparisons at once (and corrects for their number), `bca_interval` resamples churches for all at once; `scipy.stats.permutation_test` (of pairs,
vectorized) and `scipy.stats.bootstrap` (BCa) are called once per comparison, as their manual shows. Tables with the same number of churches and the same seed share
their resamples: `first table` draws them, `next table` finds them drawn. All run in turn, in one process with one thread. What is printed: the median of the ratios of the repeats and
their range; the largest difference of any p in standard errors of two simulated p, and of any end of an interval; and the peak memory of a fresh process that runs one of the two, above that of one which runs none.
"""
import argparse, os, subprocess, sys, time
os.environ.setdefault('OMP_NUM_THREADS', '1') # before numpy
import numpy as np, pandas as pd
from memory import peak_megabytes
from scipy import stats
from ssl_wikichurches.stats.families import max_t
from ssl_wikichurches.stats import shift as iou_stats
from ssl_wikichurches.stats.shift import bca_interval
from ssl_wikichurches.stats.tests import draw_shifts

def family(a): return draw_shifts(np.random.default_rng(0), (a.churches,a.comparisons), mean=.004)

def ours(d, a):
    ends = lambda: np.stack(bca_interval(d, 0, a.resamples))
    def first():
        iou_stats._counts.cache_clear()
        return ends()
    return {'flips':lambda: max_t(pd.DataFrame(d), a.resamples, seed=1).p.to_numpy(), 'BCa, first table':first, 'BCa, next table':ends}

def theirs(d, a):
    rng = lambda k: np.random.default_rng(k)
    p = lambda x, k: stats.permutation_test((x,), np.mean, permutation_type='samples', n_resamples=a.resamples, vectorized=True, rng=rng(k)).pvalue
    ends = lambda x: stats.bootstrap((x,), np.mean, method='BCa', n_resamples=a.resamples, rng=rng(0)).confidence_interval
    bca = lambda: np.transpose([[*ends(x)] for x in d.T])
    return {'flips':lambda: np.array([p(x, 2+k) for k,x in enumerate(d.T)]), 'BCa, first table':bca, 'BCa, next table':bca}

def timed(f):
    "Result and seconds of the processor: a busy machine takes turns, and counts for neither side."
    start = time.process_time()
    return f(), time.process_time()-start

def compare(a):
    "name -> ratios of the repeats, seconds of both, largest differences."
    d = family(a); n,t = ours(d, a),theirs(d, a); rows = []
    for name in n:
        n[name](), t[name]() # warm
        pairs = [(timed(n[name]),timed(t[name])) for _ in range(a.repeats)]
        (x,_),(y,_) = pairs[0]
        se = np.sqrt(2*np.maximum(x*(1-x), 1/a.resamples)/a.resamples) if name=='flips' else np.nan
        ratios = [slow/fast for (_,fast),(_,slow) in pairs]
        rows.append(dict(what=name, times=np.median(ratios), least=min(ratios), most=max(ratios), ours_ms=1e3*np.median([f for (_,f),_ in pairs]), scipy_ms=1e3*np.median([s for _,(_,s) in pairs]),
                         largest_difference=np.abs(x-y).max(), in_standard_errors=(np.abs(x-y)/se).max()))
    return pd.DataFrame(rows).set_index('what')

def peak(a):
    "Peak memory after one run of `a.peak`, in MiB."
    d = family(a)
    if a.peak!='none': who,what = a.peak.split(maxsplit=1); dict(ours=ours, scipy=theirs)[who](d, a)[what]()
    return peak_megabytes()

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name,default in dict(comparisons=12, churches=139, resamples=9999, repeats=7).items(): p.add_argument(f'--{name}', type=int, default=default)
    p.add_argument('--peak', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.peak: raise SystemExit(print(peak(a)))
    table = compare(a)
    print(table.round(18).to_string(float_format='{:.3g}'.format))
    whole = table.loc[['flips','BCa, first table'],['ours_ms','scipy_ms']].sum()
    print(f'flips and first table together: {whole.scipy_ms/whole.ours_ms:.1f} times')
    fresh = lambda what: float(subprocess.run([sys.executable, __file__, '--peak', what, *sys.argv[1:]], capture_output=True, text=True, check=True).stdout)
    base = fresh('none')
    print('peak memory above a process that computes nothing, MiB:', {f'{who} {what}':round(fresh(f'{who} {what}')-base, 1) for what in ('flips','BCa, first table') for who in ('ours','scipy')})
