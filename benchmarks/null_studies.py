"""How often do the tests raise a false alarm, and the intervals miss, when the true mean shift is zero?

    python benchmarks/null_studies.py [--studies 2000] [--out results/statistics/null_studies.csv]

Made-up studies of 139 churches with exact zeros (`draw_shifts`), symmetric and skewed. Without a seed effect: type I error of the t-test, the sign-flip test and Wilcoxon-Pratt, and
coverage of the t and BCa intervals. With a seed effect once and three times as large as the standard error over churches: type I error of a t-test of one seed and of the mean of five, and coverage of the
crossed bootstrap and of the interval over churches and seeds by mean squares. For a family of 144 heads that share most of their variance, in a fifth of the studies: any false alarm of Holm's t-tests and of
step-down max-T. One row per rate, with its Monte-Carlo standard error, the number of studies and of resamples (or sign patterns).
"""
import argparse, time
from pathlib import Path
import numpy as np, pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests
from ssl_wikichurches.inference import crossed_bootstrap, draw_shifts, max_t, seed_variance, sign_flip_p, wilcoxon_pratt

N,SD,SEEDS,HEADS,SHARED = 139,.04,5,144,.7
FLIPS,FAMILY_FLIPS,RESAMPLES = 999,499,1999 # of each study
SHAPES = ('symmetric','skewed')

def row(shape, measure, method, hit, seeds=1, seed_sd=0., resamples=0, comparisons=1):
    rate,studies = float(np.mean(hit)),len(hit)
    return dict(shape=shape, measure=measure, method=method, nominal=.95 if measure=='coverage' else .05, rate=rate, mc_se=np.sqrt(rate*(1-rate)/studies), studies=studies, n=N, seeds=seeds,
                comparisons=comparisons, seed_sd=seed_sd, resamples=resamples)

def holds(low, high): return (np.asarray(low)<=0)&(0<=np.asarray(high))

def one_model(shape, studies, rng):
    "Tests and intervals over churches, no seed effect."
    d = draw_shifts(rng, (studies,N), sd=SD, skewed=shape=='skewed')
    t = stats.ttest_1samp(d, 0, axis=1)
    yield row(shape, 'type I error', 't', t.pvalue<=.05)
    yield row(shape, 'type I error', 'sign flip', [sign_flip_p(x, FLIPS, k).p.item()<=.05 for k,x in enumerate(d)], resamples=FLIPS)
    yield row(shape, 'type I error', 'Wilcoxon-Pratt', [wilcoxon_pratt(x).p.item()<=.05 for x in d])
    ci = t.confidence_interval(.95)
    yield row(shape, 'coverage', 't', holds(ci.low, ci.high))
    bca = [stats.bootstrap((x,), np.mean, method='BCa', n_resamples=RESAMPLES, rng=rng).confidence_interval for x in d]
    yield row(shape, 'coverage', 'BCa', holds([b.low for b in bca], [b.high for b in bca]), resamples=RESAMPLES)

def many_seeds(shape, studies, rng, ratio):
    "Tests and intervals about the recipe: churches, seeds and their interaction vary."
    seed_sd = ratio*SD/N**.5
    d = draw_shifts(rng, (studies,N,1), sd=SD, skewed=shape=='skewed')+rng.normal(0, seed_sd, (studies,1,SEEDS))+rng.normal(0, SD/4, (studies,N,SEEDS))
    about = dict(seed_sd=seed_sd)
    yield row(shape, 'type I error', 't, one seed', stats.ttest_1samp(d[:,:,0], 0, axis=1).pvalue<=.05, **about)
    yield row(shape, 'type I error', 't, mean of five seeds', stats.ttest_1samp(d.mean(2), 0, axis=1).pvalue<=.05, seeds=SEEDS, **about)
    boot = pd.concat([crossed_bootstrap(x, RESAMPLES, k) for k,x in enumerate(d)])
    yield row(shape, 'coverage', 'crossed bootstrap', holds(boot.low, boot.high), seeds=SEEDS, resamples=RESAMPLES, **about)
    parts = pd.concat([seed_variance(x) for x in d])
    for source,name in (('seeds','t over seeds'), ('both','mean squares')):
        s = parts[parts.source==source]
        yield row(shape, 'coverage', name, holds(s.low, s.high), seeds=SEEDS, **about)

def family(shape, studies, rng):
    "Any false alarm among correlated heads."
    draw = lambda k: draw_shifts(rng, (N,k), sd=SD, skewed=shape=='skewed')
    alarms = dict.fromkeys(('Holm of t','max-T step-down'), ())
    for k in range(studies):
        d = draw(1)*SHARED**.5+draw(HEADS)*(1-SHARED)**.5
        holm = multipletests(stats.ttest_1samp(d, 0).pvalue, method='holm')[1].min()
        alarms = {m:(*a, p<=.05) for (m,a),p in zip(alarms.items(), (holm, max_t(pd.DataFrame(d), FAMILY_FLIPS, k).p_step_down.min()))}
    for method,hit in alarms.items(): yield row(shape, 'family error', method, hit, resamples=FAMILY_FLIPS*(method!='Holm of t'), comparisons=HEADS)

def null_studies(studies, seed=0):
    "All rates, as a table."
    rng = np.random.default_rng(seed)
    rows = [r for shape in SHAPES for r in one_model(shape, studies, rng)]
    rows += [r for ratio in (1,3) for shape in SHAPES for r in many_seeds(shape, studies, rng, ratio)]
    rows += [r for shape in SHAPES for r in family(shape, studies//5, rng)]
    return pd.DataFrame(rows).assign(rng_seed=seed)

if __name__=='__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--studies', type=int, default=2000)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=Path, default=Path(__file__).parent.parent/'results'/'statistics'/'null_studies.csv')
    args = parser.parse_args()
    start = time.perf_counter()
    table = null_studies(args.studies, args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out, index=False, float_format='%.6g')
    print(table.to_string(index=False)); print(f'{time.perf_counter()-start:.0f} s')
