"""How often do the tests raise a false alarm, and the intervals miss, when the true mean shift is zero?

    python benchmarks/null_studies.py [--studies 2000] [--out results/statistics/null_studies.csv]
    python benchmarks/null_studies.py --study FOLDER

Studies of 139 churches without a shift. Two shapes are made up (`draw_shifts`: exact zeros, symmetric or skewed), the others are drawn with replacement from measured and centered shifts, one shape per tier of
results/statistics/real_shifts.csv; `--study` writes that file from a folder of runs (mean over heads of the last block, IoU@90, one mean per church, the lowest seed).

Without a seed effect: type I error of the t-test, the sign-flip test and Wilcoxon-Pratt (also with random signs, which is its own null), and coverage of the t, BCa and bootstrap-t intervals. With a seed effect once and three
times as large as the standard error over churches (made-up shapes): type I error of a t-test of one seed and of the mean of five, and coverage of the crossed bootstrap and of the interval over churches and seeds by mean squares.
For a family of 144 heads that share most of their variance: any false alarm of Holm's t-tests and of step-down max-T by sign flips and by bootstrap. One row per rate, with its Monte-Carlo standard error, the number of studies
and of resamples (or sign patterns).
"""
import argparse, time
from pathlib import Path
import numpy as np, pandas as pd
from scipy import stats
from ssl_wikichurches.stats.families import max_t
from ssl_wikichurches.stats.seeds import crossed_bootstrap, seed_variance
from ssl_wikichurches.stats.shift import bca_interval, holm
from ssl_wikichurches.stats.tests import bootstrap_t_interval, draw_shifts, sign_flip_p, wilcoxon_pratt

N,SD,SEEDS,HEADS,SHARED = 139,.04,5,144,.7
FLIPS,FAMILY_FLIPS,RESAMPLES = 999,499,1999 # of each study
FOLDER = Path(__file__).parent.parent/'results'/'statistics'

def write_real_shifts(study, path):
    "Shifts of IoU@90 of a study, centered: one mean per church of each tier's lowest seed. No names, sorted within a tier."
    from ssl_wikichurches.stats.seeds import shift_grid
    from ssl_wikichurches.study.reader import open_study
    scores = open_study(study).scores()
    if scores.model.nunique()!=1: raise SystemExit(f"{study} holds the models {[*scores.model.unique()]}: expected one")
    grids = {tier:shift_grid(g).iloc[:,0] for tier,g in scores[scores.tier!='linear'].groupby('tier', sort=False)}
    table = pd.concat([pd.DataFrame(dict(tier=tier, shift=np.sort(d-d.mean()))) for tier,d in grids.items()], ignore_index=True)
    about = f"# Shifts of IoU@90 (last block, mean over heads) of {scores.model.iloc[0]} on photographs of WikiChurches, one seed: a mean per church, minus the mean of all, sorted"
    path.write_text(about+'\n'+table.to_csv(index=False, float_format='%.9g'))

def made_up(skewed): return lambda rng,shape: draw_shifts(rng, shape, sd=SD, skewed=skewed)
def measured(d):
    d = d.to_numpy()*SD/d.std(ddof=0) # the scale matters to no rate; with one scale the families mix alike
    return lambda rng,shape: rng.choice(d, shape)

MADE_UP = dict(symmetric=made_up(False), skewed=made_up(True))
def shapes(): return MADE_UP|{f'real, {t}':measured(g['shift']) for t,g in pd.read_csv(FOLDER/'real_shifts.csv', comment='#').groupby('tier', sort=False)}

def row(shape, measure, method, hit, seeds=1, seed_sd=0., resamples=0, comparisons=1):
    rate,studies = float(np.mean(hit)),len(hit)
    return dict(shape=shape, measure=measure, method=method, nominal=.95 if measure=='coverage' else .05, rate=rate, mc_se=np.sqrt(rate*(1-rate)/studies), studies=studies, n=N, seeds=seeds,
                comparisons=comparisons, seed_sd=seed_sd, resamples=resamples)

def holds(low, high): return (np.asarray(low)<=0)&(0<=np.asarray(high))

def one_model(shape, draw, studies, rng):
    "Tests and intervals over churches, no seed effect."
    d = draw(rng, (studies,N))
    t = stats.ttest_1samp(d, 0, axis=1)
    yield row(shape, 'type I error', 't', t.pvalue<=.05)
    yield row(shape, 'type I error', 'sign flip', [sign_flip_p(x, FLIPS, k).p.item()<=.05 for k,x in enumerate(d)], resamples=FLIPS)
    yield row(shape, 'type I error', 'Wilcoxon-Pratt', [wilcoxon_pratt(x).p.item()<=.05 for x in d])
    yield row(shape, 'type I error', 'Wilcoxon-Pratt, random signs', [wilcoxon_pratt(x).p.item()<=.05 for x in d*rng.choice([-1,1], d.shape)])
    ci = t.confidence_interval(.95)
    yield row(shape, 'coverage', 't', holds(ci.low, ci.high))
    yield row(shape, 'coverage', 'BCa', [holds(*bca_interval(x, k, RESAMPLES)) for k,x in enumerate(d)], resamples=RESAMPLES)
    for name,symmetric in (('bootstrap t',True), ('bootstrap t, equal tails',False)):
        ends = pd.concat([bootstrap_t_interval(x, draws=RESAMPLES, seed=k, symmetric=symmetric) for k,x in enumerate(d)])
        yield row(shape, 'coverage', name, holds(ends.low, ends.high), resamples=RESAMPLES)

def many_seeds(shape, draw, studies, rng, ratio):
    "Tests and intervals about the recipe: churches, seeds and their interaction vary."
    seed_sd = ratio*SD/N**.5
    d = draw(rng, (studies,N,1))+rng.normal(0, seed_sd, (studies,1,SEEDS))+rng.normal(0, SD/4, (studies,N,SEEDS))
    about = dict(seed_sd=seed_sd)
    yield row(shape, 'type I error', 't, one seed', stats.ttest_1samp(d[:,:,0], 0, axis=1).pvalue<=.05, **about)
    yield row(shape, 'type I error', 't, mean of five seeds', stats.ttest_1samp(d.mean(2), 0, axis=1).pvalue<=.05, seeds=SEEDS, **about)
    boot = pd.concat([crossed_bootstrap(x, RESAMPLES, k) for k,x in enumerate(d)])
    yield row(shape, 'coverage', 'crossed bootstrap', holds(boot.low, boot.high), seeds=SEEDS, resamples=RESAMPLES, **about)
    parts = pd.concat([seed_variance(x) for x in d])
    for source,name in (('seeds','t over seeds'), ('both','mean squares')):
        s = parts[parts.source==source]
        yield row(shape, 'coverage', name, holds(s.low, s.high), seeds=SEEDS, **about)

def family(shape, draw, studies, rng):
    "Any false alarm among correlated heads."
    alarms = {'Holm of t':[], 'max-T, sign flips':[], 'max-T, bootstrap':[]}
    for k in range(studies):
        d = pd.DataFrame(draw(rng, (N,1))*SHARED**.5+draw(rng, (N,HEADS))*(1-SHARED)**.5)
        smallest = holm(pd.Series(stats.ttest_1samp(d, 0).pvalue)).min(), *(max_t(d, FAMILY_FLIPS, k, m).p_step_down.min() for m in ('flip','bootstrap'))
        for hits,p in zip(alarms.values(), smallest): hits.append(p<=.05)
    for method,hits in alarms.items(): yield row(shape, 'family error', method, hits, resamples=FAMILY_FLIPS*(method!='Holm of t'), comparisons=HEADS)

def null_studies(studies, seed=0):
    "All rates, as a table; every block of rows has its own stream of random numbers."
    blocks = [(one_model, s, d, ()) for s,d in shapes().items()]+[(many_seeds, s, d, (ratio,)) for ratio in (1,3) for s,d in MADE_UP.items()]+[(family, s, d, ()) for s,d in shapes().items()]
    rows = [r for k,(block,shape,draw,more) in enumerate(blocks) for r in block(shape, draw, studies, np.random.default_rng([seed,k]), *more)]
    return pd.DataFrame(rows).assign(rng_seed=seed)

if __name__=='__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--studies', type=int, default=2000)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=Path, default=FOLDER/'null_studies.csv')
    parser.add_argument('--study', type=Path, help='write real_shifts.csv from this folder of runs, and nothing else')
    args = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    if args.study: raise SystemExit(write_real_shifts(args.study, FOLDER/'real_shifts.csv'))
    start = time.perf_counter()
    table = null_studies(args.studies, args.seed)
    table.to_csv(args.out, index=False, float_format='%.6g')
    print(table.to_string(index=False)); print(f'{time.perf_counter()-start:.0f} s')
