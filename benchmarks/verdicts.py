"""How often does a verdict claim what is not so, and how often does it see what is?

    python benchmarks/verdicts.py [--studies 1000] [--r .6] [--out results/statistics/verdicts.csv]

Made-up studies of 139 churches: fourteen tiers and three controls that all of them are compared with, measured by the declared metric and by the layout-free one. A church has a shift of its own, so has a seed, and so has a church
under a seed; the shifts by the two metrics are correlated (`--r`: .6; the second witness of a loss, the declared metric without the border, is nearer to .95). `seed_sd` is the standard deviation between seeds as a multiple of the standard error over churches. Truths:

- `no shift`: nothing moves by either metric.
- `as a control`: every tier moves as far as one of its controls, and farther than the two others. No tier is more than any training.
- `one test short`: every tier is far beyond all controls by the layout-free metric and beyond two of them by the declared one, but moves no farther than the third by that: of all tests that a claim needs, one is null.
- `layout`: every tier moves by the declared metric, farther than all controls, and not at all by the layout-free one.
- `towards, d_z .2` (and .4, .6): every tier moves by that many standard deviations over churches by both metrics, and no control moves.

Rules, on the same studies: `churches` averages seeds and asks BCa intervals over churches, by the declared metric alone, of each tier by itself (the shift and every difference from a control lie above zero); `verdict` is the rule of
`verdict_table`. Counted are claims of *towards* (and *away*) of one tier, and studies with any; and, of `no shift`, how often the interval of one shift excludes zero (`shift`): by BCa over churches, and over churches and seeds.
"""
import argparse
from collections import namedtuple
from itertools import product
from pathlib import Path
import numpy as np, pandas as pd
from ssl_wikichurches.stats.shift import bca_interval, equivalence_p, holm, shift_test
from ssl_wikichurches.study.specificity import joint_p, verdict

CHURCHES,TIERS,CONTROLS,SD,REST,R = 139,14,3,.04,.02,.6
DESIGNS = ((1,0.),(1,1.),(1,3.),(2,0.),(2,1.),(2,3.),(3,0.),(3,1.),(3,3.),(5,1.),(5,3.)) # seeds, seed_sd
STILL = (0,0,0)
TRUTHS = {'no shift':((0,0),STILL,STILL), 'as a control':((.5,.5),(.5,0,0),(.5,0,0)), 'one test short':((2,2),(2,0,0),STILL), 'layout':((.5,0),STILL,STILL),
          'towards, d_z .2':((.2,.2),STILL,STILL), 'towards, d_z .4':((.4,.4),STILL,STILL), 'towards, d_z .6':((.6,.6),STILL,STILL)} # d_z of the tiers by both metrics; of the controls by each
Row = namedtuple('Row', 'seeds gain p_holm second_gain second_p beyond not_beyond p_joint_holm p_none')

def draw(rng, truth, studies, seeds, seed_sd, r=R):
    "Shifts by both metrics, (metrics, studies, tiers and controls, churches, seeds)."
    (mine,free),theirs,theirs_free = truth
    normal = lambda *shape: np.stack([a := rng.normal(size=shape), r*a+(1-r*r)**.5*rng.normal(size=shape)])
    shape = (studies,TIERS+CONTROLS)
    d = SD*normal(*shape, CHURCHES, 1)+seed_sd*SD/CHURCHES**.5*normal(*shape, 1, seeds)+REST*normal(*shape, CHURCHES, seeds)
    mean = np.array([[mine]*TIERS+[*theirs],[free]*TIERS+[*theirs_free]])*SD
    return d+mean[:,None,:,None,None]

def holm_rows(p):
    "Holm's correction within each row."
    order = np.argsort(p, axis=1)
    steps = np.maximum.accumulate(np.take_along_axis(p, order, 1)*np.arange(p.shape[1], 0, -1), axis=1).clip(max=1)
    out = np.empty_like(p); np.put_along_axis(out, order, steps, 1)
    return out

def by_churches(d):
    "The former rule: (studies, tiers) claims; and whether the interval of the shift alone excludes zero."
    x = d[0].mean(-1) # studies, tiers and controls, churches
    mine,theirs = x[:,:TIERS],x[:,TIERS:]
    columns = np.concatenate([mine[:,:,None], mine[:,:,None]-theirs[:,None]], 2) # studies, tiers, 1+controls, churches
    low,high = (e.reshape(columns.shape[:3]) for e in bca_interval(columns.reshape(-1, CHURCHES).T, n_resamples=999))
    return np.where((low>0).all(-1), 'towards', ''),(low*high>0)[:,:,0]

def by_verdict(d, alpha=.05, margin=.01):
    "The rule of `verdict_table`: (studies, tiers) words; and whether the interval of the shift alone excludes zero."
    mine,theirs = d[:,:,:TIERS],d[:,:,TIERS:]
    alone = shift_test(mine)
    against = [shift_test(mine-theirs[:,:,c][:,:,None]) for c in range(CONTROLS)]
    gain,direction = alone['shift'],np.sign(alone['shift'][0])
    ps = np.stack([np.where(f['shift']*direction>0, f['p'], 1.) for f in (alone,*against)]) # tests, metrics, studies, tiers
    joint = holm_rows(ps.max((0,1)))
    beyond = (ps[1:].max(1)<alpha).sum(0)
    first = {k:v[0] for k,v in alone.items()}
    fields = (gain[0], holm_rows(alone['p'][0]), gain[1], alone['p'][1], beyond, CONTROLS-beyond, joint, equivalence_p(first, margin))
    k = d.shape[-1]
    assert np.isclose(ps[:,:,0,0].max(), joint_p(direction[0,0], [(f['shift'][m,0,0],f['p'][m,0,0]) for f in (alone,*against) for m in (0,1)]))
    return np.array([[verdict(Row(k, *v), alpha) for v in zip(*(f[s] for f in fields))] for s in range(d.shape[1])]),alone['p'][0]<alpha

def rate(hit): # (studies, ...) bool; tiers of one study share controls, so the study is the unit
    each = hit.reshape(len(hit), -1).mean(1)
    return dict(rate=each.mean(), mc_se=each.std(ddof=1)/len(each)**.5, studies=len(each))

def rates(rng, studies, r=R, chunk=50):
    for (seeds,seed_sd),(name,truth) in product(DESIGNS, TRUTHS.items()):
        if seeds==1 and name.startswith('towards'): continue
        found = {'churches':[], 'verdict':[]}
        for at in range(0, studies, chunk):
            d = draw(rng, truth, min(chunk, studies-at), seeds, seed_sd, r)
            for rule,f in (('churches',by_churches), ('verdict',by_verdict)): found[rule].append(f(d))
        for rule,parts in found.items():
            words,shown = map(np.concatenate, zip(*parts))
            about = dict(truth=name, seeds=seeds, seed_sd=seed_sd, rule=rule)
            for claim in ('towards','away') if rule=='verdict' else ('towards',):
                for event,hit in (('one tier',words==claim), ('any of 14',(words==claim).any(1))): yield about|dict(claim=claim, event=event)|rate(hit)
            if name=='no shift': yield about|dict(claim='shift', event='one tier')|rate(shown)
        print(f'{seeds} seeds, seed_sd {seed_sd:g}, {name}', flush=True)

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--studies', type=int, default=1000); p.add_argument('--r', type=float, default=R, help='correlation of the two metrics'); p.add_argument('--out', default='results/statistics/verdicts.csv')
    args = p.parse_args()
    trial = np.random.default_rng(1).random((3,TIERS))
    assert np.allclose(holm_rows(trial), [holm(pd.Series(t)) for t in trial])
    table = pd.DataFrame(rates(np.random.default_rng(0), args.studies, args.r))
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out, index=False, float_format='%.6g')
    print(table[table.claim=='towards'].pivot_table(index=['truth','seeds','seed_sd'], columns=['rule','event'], values='rate', sort=False).round(3).to_string())

if __name__=='__main__': main()
