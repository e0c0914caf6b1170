"Inference against scipy, statsmodels, enumeration, and simulations with planted effects."
from itertools import product
from pathlib import Path
import numpy as np, pandas as pd, pytest
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import ttost_paired
from ssl_wikichurches.stats.families import benjamini_hochberg, max_t, split_half_heads
from ssl_wikichurches.stats.power import detectable_shift, power_curve
from ssl_wikichurches.stats.seeds import contrasts, crossed_bootstrap, moderation, seed_variance, shift_grid
from ssl_wikichurches.stats.shift import hedges_factor
from ssl_wikichurches.stats.tests import (bootstrap_t_interval, draw_shifts, effect_interval, equivalence, noncentral_t_cdf, paired_tests,
                                          sign_flip_p, wilcoxon_pratt)

ROOT = Path(__file__).parent.parent
SAME = 'identical by construction'
def rng(k=0): return np.random.default_rng(k)
def shifts(n=40, k=0, **kw): return draw_shifts(rng(k), (n,), **kw)

# ---- made-up shifts

@pytest.mark.parametrize('skewed,skewness', [(True,2/2**.5/.8**.5), (False,0)])
def test_drawn_shifts_have_the_moments_they_claim(skewed, skewness):
    d = draw_shifts(rng(), (1_000_000,), sd=.04, skewed=skewed)
    assert abs(d.mean())<2e-4 and d.std()==pytest.approx(.04, rel=.01) and (d==0).mean()==pytest.approx(.2, abs=.002)
    assert stats.skew(d)==pytest.approx(skewness, abs=.06)
    m = draw_shifts(rng(), (1_000_000,), mean=.02, zeros=.5)
    assert m.mean()==pytest.approx(.02, abs=3e-4) and (m==0).mean()==pytest.approx(.5, abs=.002)

# ---- tests of one vector

def brute_p(d):
    means = [np.dot(s, d) for s in product((1,-1), repeat=len(d))]
    return np.mean([abs(m)>=abs(sum(d))-1e-12 for m in means])

@pytest.mark.parametrize('k', range(6))
def test_sign_flips_enumerated(k):
    d = shifts(3+k, k, zeros=.3); r = sign_flip_p(d)
    if d.any(): assert r.p.item()==pytest.approx(brute_p(d), abs=1e-15) and r.exact.item()
    ties = rng(k).integers(-3, 4, 9)*.1 # sums that tie but for rounding
    if ties.any(): assert sign_flip_p(ties).p.item()==pytest.approx(brute_p(ties), abs=1e-15)

def test_sign_flips_against_scipy():
    d = shifts(14, 1, mean=.02, zeros=0)
    exact = stats.permutation_test((d,), np.mean, permutation_type='samples', n_resamples=np.inf).pvalue
    assert sign_flip_p(d).p.item()==pytest.approx(exact, abs=1e-12)
    d = shifts(139, 2, mean=.004); drawn = sign_flip_p(d)
    assert not drawn.exact.item() and drawn.patterns.item()==99_999
    other = stats.permutation_test((d,), np.mean, permutation_type='samples', n_resamples=20_000, rng=rng(3)).pvalue
    assert abs(drawn.p.item()-other)<5*np.sqrt(other*(1-other)/20_000)+1e-4

def test_drawn_flips_agree_with_exact_ones():
    d = shifts(16, 3, mean=.01, zeros=0); more = np.r_[d, 1e-9] # 17 moved churches: drawn
    assert not sign_flip_p(more).exact.item() and sign_flip_p(more).p.item()==pytest.approx(sign_flip_p(d).p.item(), abs=.01)

def test_drawn_p_is_never_zero(): assert sign_flip_p(np.linspace(1, 2, 60), draws=99).p.item()==1/100

@pytest.mark.parametrize('n,zeros', [(139,.2), (30,0.), (12,.4)])
def test_wilcoxon_against_scipy_and_walsh_averages(n, zeros):
    d = shifts(n, 4, zeros=zeros); r = wilcoxon_pratt(d)
    assert r.p.item()==stats.wilcoxon(d, zero_method='pratt').pvalue
    assert r.estimate.item()==pytest.approx(np.median([(d[i]+d[j])/2 for i in range(n) for j in range(i, n)]))

def test_three_tests_side_by_side():
    d = shifts(139, 5); t = paired_tests(d).set_index('test')
    assert t.p['t']==pytest.approx(2*stats.t.sf(abs(d.mean()/d.std(ddof=1)*139**.5), 138)) and t.p['sign flip']==sign_flip_p(d).p.item()
    assert (t.n==139).all() and (t.unit=='score').all() and (t.zeros==(d==0).sum()).all()

def test_identical_shifts_have_no_p_anywhere():
    z = np.zeros(20)
    for r in (sign_flip_p(z), wilcoxon_pratt(z), paired_tests(z), effect_interval(z), effect_interval(z, .9), equivalence(z, .01), equivalence(z, .2, 'd_z'), crossed_bootstrap(np.zeros((20,3))), seed_variance(np.zeros((20,3)))):
        assert (r.note==SAME).all() and (r.n==20).all() and r.unit.notna().all()
        for c in {'p','low','high'}&set(r): assert r[c].isna().all()
    assert not equivalence(z, .01).equivalent.item()
    f = max_t(pd.DataFrame(dict(a=np.zeros(20), b=shifts(20, zeros=0))))
    assert np.isnan(f.p_max_t[0]) and f.note[0]==SAME and f.p_max_t[1]==f.p[1]
    assert max_t(pd.DataFrame(np.zeros((5,2)))).p.isna().all()

def test_constant_shifts_are_not_called_identical():
    c = np.full(10, .02); t = paired_tests(c).set_index('test')
    assert np.isnan(t.p['t']) and 'same amount' in t.note['t'] and t.p['sign flip']==2/2**10
    assert 'same amount' in effect_interval(c).note.item() and 'same amount' in equivalence(c, .01).note.item()
    assert max_t(pd.DataFrame(dict(a=c))).p_max_t.item()==2/2**10

def test_swapping_before_and_after():
    d = shifts(60, 6, mean=.01)
    for f in (sign_flip_p, wilcoxon_pratt, lambda x: equivalence(x, .02), lambda x: equivalence(x, .4, 'd_z'), effect_interval):
        a,b = f(d).iloc[0], f(-d).iloc[0]
        assert a.estimate==pytest.approx(-b.estimate)
        if 'p' in a: assert a.p==pytest.approx(b.p, rel=1e-9)
        if 'low' in a: assert a.low==pytest.approx(-b.high, abs=1e-8) and a.high==pytest.approx(-b.low, abs=1e-8)
    x = pd.DataFrame(draw_shifts(rng(7), (60,5), mean=.01))
    a,b = max_t(x, 999), max_t(-x, 999)
    assert np.allclose(a['t'], -b['t']) and np.array_equal(a[['p','p_max_t','p_step_down']], b[['p','p_max_t','p_step_down']])

def test_order_of_churches_does_not_matter():
    d = shifts(60, 8, mean=.01); o = rng(1).permutation(60)
    for f in (sign_flip_p, wilcoxon_pratt, effect_interval, lambda x: equivalence(x, .02), paired_tests):
        for c in f(d).select_dtypes('number'): assert np.allclose(f(d)[c], f(d[o])[c], equal_nan=True, atol=1e-9), c
    x = pd.DataFrame(draw_shifts(rng(7), (60,5), mean=.01))
    pd.testing.assert_frame_equal(max_t(x, 999), max_t(x.iloc[o], 999))

@pytest.mark.parametrize('f', [sign_flip_p, wilcoxon_pratt, paired_tests, effect_interval, lambda d: equivalence(d, .1)])
def test_what_is_no_vector_of_shifts_is_refused(f):
    with pytest.raises(ValueError, match='one vector'): f(np.zeros((4,4)))
    with pytest.raises(ValueError, match='not finite'): f([1,2,np.nan])
    with pytest.raises(ValueError, match='at least 3'): f([1,2])

# ---- effect size and equivalence

@pytest.mark.parametrize('n,d_z', [(3,.5), (8,-1.2), (139,.2), (139,1.), (40,0.), (139,5.), (60,-4.)])
def test_effect_interval_inverts_the_noncentral_t(n, d_z):
    x = rng(n).normal(size=n); x = (x-x.mean())/x.std(ddof=1)+d_z
    r = effect_interval(x, .9).iloc[0]; t = d_z*n**.5
    assert r.estimate==pytest.approx(hedges_factor(n-1)*d_z, abs=1e-9)
    assert stats.nct.sf(t, n-1, r.low*n**.5)==pytest.approx(.05, abs=1e-6) and stats.nct.cdf(t, n-1, r.high*n**.5)==pytest.approx(.05, abs=1e-6)

def test_noncentral_t_where_scipy_has_no_answer(monkeypatch):
    points = [(2,-14.687293578552989,13.114329582555165), (129,4.842515576794524,-4.896472656655565), (115,-4.781494781108485,4.411026292611552)]
    assert all(0<=noncentral_t_cdf(t, df, nc)<=1 for df,t,nc in points)
    known = [(df,t,nc,stats.nct.cdf(t, df, nc)) for df in (2,10,138) for t in (-3.,.5,6.) for nc in (-2.,0.,4.)]
    monkeypatch.setattr(stats.nct, 'cdf', lambda *a: np.nan)
    for df,t,nc,p in known: assert noncentral_t_cdf(t, df, nc)==pytest.approx(p, rel=1e-7, abs=1e-12)

def test_effect_interval_covers():
    d = rng(0).normal(.4, 1, (400,25))
    r = pd.concat([effect_interval(x) for x in d])
    assert abs(((r.low<.4)&(.4<r.high)).mean()-.95)<3*np.sqrt(.05*.95/400)
    assert abs(r.estimate.mean()-.4)<3*r.estimate.std()/400**.5

@pytest.mark.parametrize('k', range(12))
def test_equivalence_is_inclusion_of_the_interval(k):
    d = shifts(25+10*k, k, mean=.002*k)
    a = equivalence(d, .012, alpha=.05).iloc[0]
    p,lower,upper = ttost_paired(d+.3, np.full(len(d), .3), -.012, .012)
    assert a.p==pytest.approx(p, rel=1e-6) and a.p_above==pytest.approx(lower[1], rel=1e-6) and a.p_below==pytest.approx(upper[1], rel=1e-6)
    ci = stats.ttest_1samp(d, 0).confidence_interval(.9)
    assert (a.low,a.high)==pytest.approx((ci.low,ci.high)) and a.equivalent==(-.012<ci.low and ci.high<.012)
    b = equivalence(d, .3, 'd_z').iloc[0]; e = effect_interval(d, .9).iloc[0]
    assert (b.low,b.high)==pytest.approx((e.low,e.high)) and b.equivalent==(-.3<e.low and e.high<.3)

def test_equivalence_at_the_edge_of_the_interval():
    d = shifts(80, 3, mean=.004)
    for unit in ('score','d_z'):
        r = equivalence(d, 1, unit).iloc[0]; edge = max(abs(r.low), abs(r.high))
        assert equivalence(d, edge, unit).p.item()==pytest.approx(.05, abs=1e-6)

def test_equivalence_rarely_accepts_a_shift_at_the_margin():
    d = rng(1).normal(.3, 1, (300,139))
    assert np.mean([equivalence(x, .3, 'd_z').equivalent.item() for x in d])<.05+3*np.sqrt(.05*.95/300)
    d = rng(1).normal(0, 1, (50,300))
    assert np.mean([equivalence(x, .3, 'd_z').equivalent.item() for x in d])>.9

@pytest.mark.parametrize('bad,match', [(dict(margin=0), 'above 0'), (dict(margin=-.1), 'above 0'), (dict(margin=np.nan), 'above 0'), (dict(margin=1, unit='iou'), 'iou'), (dict(margin=1, alpha=.5), 'alpha')])
def test_margins_that_are_none(bad, match):
    with pytest.raises(ValueError, match=match): equivalence(shifts(), **bad)

# ---- seeds

def grid(n=139, k=5, seed_sd=.004, mean=0., g=None):
    g = g or rng(0)
    return draw_shifts(g, (n,1), mean)+g.normal(0, seed_sd, (1,k))+g.normal(0, .01, (n,k))

def test_crossed_bootstrap_against_a_loop():
    x = grid(20, 4); r = crossed_bootstrap(x, 4000).iloc[0]; g = rng(9)
    loop = [x[np.ix_(g.integers(0,20,20), g.integers(0,4,4))].mean() for _ in range(4000)]
    assert r.estimate==pytest.approx(x.mean()) and r.se==pytest.approx(np.std(loop), rel=.06)
    assert (r.low,r.high)==pytest.approx(tuple(np.quantile(loop, [.025,.975])), abs=.15*r.se)

def test_crossed_bootstrap_has_the_variance_of_owen():
    "Exact variance of the mean of a doubly resampled grid, from its definition."
    x = grid(15, 4); n,k = x.shape; c = x-x.mean()
    exact = ((c.mean(1)**2).sum()*(k-1)/k/n**2+(c.mean(0)**2).sum()*(n-1)/n/k**2+(c**2).sum()/(n*k)**2)
    assert crossed_bootstrap(x, 60_000).se.item()**2==pytest.approx(exact, rel=.03)

def test_seeds_alike_leave_the_churches_alone():
    d = shifts(50, 2); x = np.repeat(d[:,None], 3, 1); v = seed_variance(x).set_index('source')
    assert v.sd['seeds']==pytest.approx(0, abs=1e-12) and v.se['both']==pytest.approx(d.std(ddof=1)/50**.5) and v.df['both']==pytest.approx(49)
    ci = stats.ttest_1samp(d, 0).confidence_interval(.95)
    assert (v.low['both'],v.high['both'])==pytest.approx((ci.low,ci.high))

def test_seed_variance_against_scipy_and_anova():
    x = grid(30, 4); v = seed_variance(x, .9).set_index('source')
    for source,means in (('churches',x.mean(1)), ('seeds',x.mean(0))):
        ci = stats.ttest_1samp(means, 0).confidence_interval(.9)
        assert (v.low[source],v.high[source])==pytest.approx((ci.low,ci.high)) and v.se[source]==pytest.approx(stats.sem(means))
    long = pd.DataFrame([dict(i=i, k=k, y=x[i,k]) for i in range(30) for k in range(4)])
    m = anova_lm(ols('y ~ C(i)+C(k)', long).fit()); ms = m.sum_sq/m.df
    total = ms['C(i)']+ms['C(k)']-ms['Residual']
    assert v.se['both']==pytest.approx(np.sqrt(total/120)) and v.df['both']==pytest.approx(total**2/(ms**2/m.df).sum())

def test_intervals_keep_their_promise_about_a_recipe():
    d = [grid(60, 5, .006, g=rng(k)) for k in range(250)]
    both = pd.concat([seed_variance(x).iloc[[2]] for x in d]); churches = pd.concat([seed_variance(x).iloc[[0]] for x in d])
    covers = lambda t: ((t.low<0)&(0<t.high)).mean()
    assert covers(both)>.95-3*np.sqrt(.05*.95/250) and covers(churches)<covers(both)

def test_grids_that_are_none():
    for f in (crossed_bootstrap, seed_variance):
        with pytest.raises(ValueError, match='one seed'): f(np.ones((9,1)))
        with pytest.raises(ValueError, match='churches, seeds'): f(np.ones(9))
        with pytest.raises(ValueError, match='every church needs every seed'): f(np.array([[1,2],[3,np.nan],[1,1]]))
        with pytest.raises(ValueError, match='level'): f(np.ones((9,2)), level=95)

def scores(tiers=('linear','lora','full'), n=20, seeds=3, photos=2, models=('a','b')):
    g,rows = rng(3), []
    for m,t,s in product(models, tiers, range(seeds)):
        before = rng(5).uniform(.1, .4, n*photos); after = before if t=='linear' else before+g.normal(.01+.03*(t=='full'), .02, n*photos)
        rows.append(pd.DataFrame(dict(model=m, tier=t, seed=s, image=[f'Q{i//photos}_wd{i%photos}' for i in range(n*photos)], church=[f'Q{i//photos}' for i in range(n*photos)], before=before, after=after)))
    return pd.concat(rows, ignore_index=True)

def test_grid_of_scores():
    s = scores(); g = s[(s.model=='a')&(s.tier=='lora')]; x = shift_grid(g)
    direct = g.assign(d=g.after-g.before).pivot_table(index='church', columns='seed', values='d')
    assert x.shape==(20,3) and np.allclose(x.loc[direct.index, direct.columns], direct)
    with pytest.raises(ValueError, match='6 pairs'): shift_grid(s)

def test_contrasts_are_paired_and_have_their_family():
    s = scores(); c = contrasts(s)
    assert len(c)==2 and (c.tier=='full').all() and (c.minus=='lora').all() and (c.n==20).all()
    f,l = (shift_grid(s[(s.model=='b')&(s.tier==t)]) for t in ('full','lora')); both = seed_variance(f-l).iloc[2]
    assert (c.low[1],c.high[1])==pytest.approx((both.low,both.high)) and c.p[1]==pytest.approx(2*stats.t.sf(abs(both.estimate/both.se), both.df)) and c.difference[1]==pytest.approx((f-l).mean(axis=None))
    assert np.allclose(c.p_holm, multipletests(c.p, method='holm')[1]) and (c.p_holm<.05).all() # a planted difference of 0.03
    flipped = contrasts(s.assign(tier=s.tier.map(dict(full='lora', lora='full', linear='linear'))))
    assert np.allclose(flipped.difference, -c.difference) and np.allclose(flipped.p, c.p)
    one = contrasts(s[(s.tier!='full')|(s.seed==1)]); a,b = (shift_grid(s[(s.model=='a')&(s.tier==t)&(s.seed==1)])[1] for t in ('full','lora')) # paired by the seed that both have
    assert one.seeds.eq(1).all() and one.over.eq('one model').all() and one.p[0]==pytest.approx(stats.ttest_rel(a, b).pvalue)
    same = s[s.tier!='full']; same = pd.concat([same, same[same.tier=='lora'].assign(tier='copy')])
    assert contrasts(same).note.eq(SAME).all() and contrasts(same).p_holm.isna().all()
    assert contrasts(s[s.tier!='full']).empty

# ---- families

def brute_max_t(x):
    n,m = x.shape; t = lambda y: np.abs(y.mean(0))/(y.std(0, ddof=1)/n**.5)
    obs = t(x); order = np.argsort(-obs); single,down,hits = np.zeros(m),np.zeros(m),0
    for s in product((1,-1), repeat=n):
        v = t(x*np.array(s)[:,None]); single += v.max()>=obs-1e-9
        down += [v[order[np.flatnonzero(order==j)[0]:]].max()>=obs[j]-1e-9 for j in range(m)]
    down = down/2**n; down[order] = np.maximum.accumulate(down[order])
    return single/2**n, down

@pytest.mark.parametrize('k', range(3))
def test_max_t_against_enumeration(k):
    x = draw_shifts(rng(k), (7,4), mean=.02)+draw_shifts(rng(k+9), (7,1), zeros=0)
    r = max_t(pd.DataFrame(x, columns=list('abcd'))); single,down = brute_max_t(x)
    assert np.allclose(r.p_max_t, single) and np.allclose(r.p_step_down, down) and r.comparison.tolist()==list('abcd')
    assert np.allclose(r['t'], stats.ttest_1samp(x, 0).statistic) and np.allclose(r.p, [sign_flip_p(c).p.item() for c in x.T])

def test_one_comparison_needs_no_correction():
    r = max_t(pd.DataFrame(dict(a=shifts(40, mean=.01))), 4999)
    assert r.p_max_t.item()==r.p.item()==r.p_step_down.item()

def test_columns_alike_count_once():
    d = shifts(139, mean=.01); one,many = max_t(pd.DataFrame({0:d}), 1999), max_t(pd.DataFrame({k:d for k in range(144)}), 1999)
    assert np.allclose(many.p_step_down, one.p.item())

def test_max_t_order_of_columns_levels_and_scale():
    x = pd.DataFrame(draw_shifts(rng(1), (30,6), mean=.01), columns=pd.MultiIndex.from_product([range(2),range(3)], names=['block','head']))
    r = max_t(x, 999).set_index(['block','head']); turned = max_t(x.iloc[:,::-1]*7, 999).set_index(['block','head']).loc[r.index]
    assert abs(r[['p','p_max_t','p_step_down']]-turned[['p','p_max_t','p_step_down']]).max(axis=None)<.06 and np.allclose(r['t'], turned['t'])

def test_max_t_keeps_the_family_error_and_finds_a_planted_head():
    alarms,found,g = [],[],rng(4)
    for _ in range(200):
        d = pd.DataFrame(draw_shifts(g, (40,12), skewed=False)*.6+draw_shifts(g, (40,1), skewed=False)*.8)
        alarms.append(max_t(d, 399).p_step_down.min()<=.05)
        d[3] += .04; found.append(max_t(d, 399).p_step_down[3]<=.05)
    assert np.mean(alarms)<.05+3*np.sqrt(.05*.95/200) and np.mean(alarms)>.005 and np.mean(found)>.9

def studentized(x, rows):
    "t of each resample about the observed mean, by scipy."
    return stats.ttest_1samp(x[rows], x.mean(0), axis=1).statistic

@pytest.mark.parametrize('skewed', [True,False])
def test_bootstrap_max_t_against_a_loop(skewed):
    x = draw_shifts(rng(3), (40,6), mean=.008, skewed=skewed)+draw_shifts(rng(4), (40,1)); x = x[np.lexsort(np.abs(x).T)]
    r = max_t(pd.DataFrame(x), 999, 5, 'bootstrap')
    t = np.abs(stats.ttest_1samp(x, 0).statistic); order = np.argsort(-t)
    null = np.abs(studentized(x, rng(5).integers(0, 40, (999,40))))
    p = lambda v, at: (1+(v>=at).sum())/1000
    down = np.maximum.accumulate([p(null[:,order[k:]].max(1), t[j]) for k,j in enumerate(order)])
    assert np.allclose(r['t'], stats.ttest_1samp(x, 0).statistic) and np.allclose(r.p, [p(null[:,j], t[j]) for j in range(6)], atol=1e-12)
    assert np.allclose(r.p_max_t, [p(null.max(1), t[j]) for j in range(6)], atol=1e-12) and np.allclose(r.p_step_down[order], down, atol=1e-12) and (r.patterns==999).all()

def test_bootstrap_max_t_of_columns_that_do_not_vary():
    x = pd.DataFrame(dict(still=np.zeros(30), moved=np.full(30, .02), varies=shifts(30, zeros=0)))
    r = max_t(x, 499, method='bootstrap').set_index('comparison')
    assert r.note['still']==SAME and 'same amount' in r.note['moved'] and r.note['varies']=='' and r.p.isna().tolist()==[True,True,False] and r.p_max_t['varies']==r.p['varies']
    assert max_t(x[['still','moved']], method='bootstrap').p.isna().all()
    o = rng(1).permutation(30)
    pd.testing.assert_frame_equal(max_t(x, 499, method='bootstrap'), max_t(x.iloc[o], 499, method='bootstrap'))
    lonely = max_t(pd.DataFrame(dict(a=(np.arange(30)==4)*1.)), 999, method='bootstrap') # a third of the resamples lack the one church that moved
    assert lonely.p.item()>.3

def test_flips_and_bootstrap_agree_where_both_are_right():
    x = pd.DataFrame(rng(2).normal(.004, .03, (139,20))); a,b = max_t(x, 9999), max_t(x, 9999, method='bootstrap')
    assert np.allclose(a['t'], b['t']) and np.abs(a.p-b.p).max()<.03 and np.abs(a.p_step_down-b.p_step_down).max()<.05

def test_bootstrap_t_against_a_loop():
    d = shifts(50, 4, mean=.01); t = studentized(d[:,None], rng(7).integers(0, 50, (999,50)))[:,0]; se = stats.sem(d)
    a,b = bootstrap_t_interval(d, .9, 999, 7).iloc[0], bootstrap_t_interval(d, .9, 999, 7, symmetric=False).iloc[0]
    reach = np.sort(np.abs(t))[900-1]
    assert (a.low,a.high)==pytest.approx((d.mean()-reach*se, d.mean()+reach*se)) and a.se==pytest.approx(se)
    assert (b.low,b.high)==pytest.approx((d.mean()-np.sort(t)[950-1]*se, d.mean()-np.sort(t)[50-1]*se))

def test_bootstrap_t_approaches_the_t_interval_of_normal_shifts():
    d = rng(0).normal(.01, .04, 2000); ci = stats.ttest_1samp(d, 0).confidence_interval(.95)
    for s in (True,False): assert bootstrap_t_interval(d, symmetric=s)[['low','high']].iloc[0].tolist()==pytest.approx([*ci], abs=.08*stats.sem(d))

@pytest.mark.parametrize('k', range(8))
def test_bootstrap_t_is_the_bootstrap_test_turned_around(k):
    d = shifts(60, k, mean=.012); d = d[np.argsort(np.abs(d), kind='stable')]
    p = max_t(pd.DataFrame(dict(a=d)), 999, 0, 'bootstrap').p.item(); r = bootstrap_t_interval(d, .95, 999).iloc[0]
    assert (p<=.05)==(not r.low<=0<=r.high)
    edge = bootstrap_t_interval(d, 1-p, 999).iloc[0] # its next wider neighbor holds zero
    assert not edge.low<=0<=edge.high

def test_bootstrap_t_where_hardly_anything_moved():
    for d,note in ((np.zeros(20),SAME), (np.full(20,.1),'same amount')):
        r = bootstrap_t_interval(d).iloc[0]
        assert note in r.note and np.isnan([r.low,r.high,r.se]).all()
    r = bootstrap_t_interval((np.arange(20)==3)*1.).iloc[0]
    assert np.isinf([r.low,r.high]).all() and 'too few churches moved' in r.note
    for bad,match in ((dict(level=95),'level'), (dict(draws=9),'at least 99')):
        with pytest.raises(ValueError, match=match): bootstrap_t_interval(shifts(), **bad)

def test_families_that_are_none():
    with pytest.raises(ValueError, match='DataFrame'): max_t(np.ones((5,2)))
    with pytest.raises(ValueError, match='expected one of'): max_t(pd.DataFrame(np.eye(4)), method='sign')
    with pytest.raises(ValueError, match='unique'): max_t(pd.DataFrame(np.ones((5,2)), columns=['a','a']))
    with pytest.raises(ValueError, match='not finite'): max_t(pd.DataFrame(dict(a=[1,2,np.nan])))

def test_false_discovery_rate_against_scipy():
    p = rng(0).uniform(0, 1, 60)**3; t = benjamini_hochberg(pd.DataFrame(dict(p=np.r_[p, np.nan])), .1)
    assert np.allclose(t.p_bh[:60], stats.false_discovery_control(p)) and (t.discovery[:60]==(t.p_bh[:60]<=.1)).all() and t.discovery.any()
    assert np.isnan(t.p_bh[60]) and not t.discovery[60]
    with pytest.raises(ValueError, match='named p'): benjamini_hochberg(pd.DataFrame(dict(q=[1.])))

def test_halves_that_choose_and_report():
    luck = split_half_heads(pd.DataFrame(draw_shifts(rng(0), (139,144))), 200)
    assert luck.chosen.mean()>.007 and abs(luck.estimate.mean())<.003 and (luck.n_chosen+luck.n==139).all()
    assert ((luck.low<luck.estimate)&(luck.estimate<luck.high)).all()
    heads = pd.DataFrame(draw_shifts(rng(1), (40,6)), columns=list('abcdef')); heads['d'] += .2
    r = split_half_heads(heads, 5)
    assert (r['head']=='d').all() and np.allclose((r.chosen*r.n_chosen+r.estimate*r.n)/40, heads['d'].mean())
    pd.testing.assert_frame_equal(r, split_half_heads(heads, 5))
    with pytest.raises(ValueError, match='at least 6'): split_half_heads(heads[:5])

# ---- moderation and power

def moderated(n=90, seeds=4, by_style=0., by_area=0., church_sd=.03):
    g = rng(2); style = g.choice(['Baroque','Gothic','Romanesque'], n); area = g.uniform(.02, .6, n)
    base = .01+by_style*(style=='Gothic')+by_area*np.log2(area)+g.normal(0, church_sd, n)
    return pd.DataFrame([dict(church=f'Q{i}', style=style[i], area=area[i], shift=base[i]+g.normal(0, .01)) for i,_ in product(range(n), range(seeds))])

def test_balanced_moderation_is_regression_of_church_means():
    t = moderated(by_style=.03, by_area=.01); r = moderation(t, 'Baroque').set_index('term')
    means = t.groupby('church').agg(shift=('shift','mean'), style=('style','first'), area=('area','first')).assign(log_area=lambda m: np.log2(m.area)-np.log2(m.area).mean())
    o = ols('shift ~ style + log_area', means).fit()
    pairs = {'Intercept':'Intercept', 'Gothic minus Baroque':'style[T.Gothic]', 'Romanesque minus Baroque':'style[T.Romanesque]', 'log_area':'log_area'}
    for ours,theirs in pairs.items(): assert r.estimate[ours]==pytest.approx(o.params[theirs], abs=1e-6) and r.se[ours]==pytest.approx(o.bse[theirs], rel=1e-3)
    assert r.converged.all() and (r.n==90).all() and (r['rows']==360).all()
    assert r.p['Gothic minus Baroque']<.01 and r.p['style, jointly']<.01 and r.p['log_area']<.01
    assert r.estimate['sd of churches']==pytest.approx(.03, rel=.25) and r.estimate['sd of rows']==pytest.approx(.01, rel=.15)

def test_moderation_without_effects_and_with_another_reference():
    r = moderation(moderated()).set_index('term'); other = moderation(moderated(), 'Gothic').set_index('term')
    assert r.p['style, jointly']>.01 and r.p['style, jointly']==pytest.approx(other.p['style, jointly'], abs=1e-4)
    assert r.estimate['Gothic minus Baroque']==pytest.approx(-other.estimate['Baroque minus Gothic'], abs=1e-6)

@pytest.mark.parametrize('factor', [.01, 100])
def test_moderation_does_not_depend_on_the_unit(factor):
    t = moderated(by_style=.03); a,b = moderation(t), moderation(t.assign(shift=t['shift']*factor))
    for c in ('estimate','se','low','high'): assert np.allclose(a[c]*factor, b[c], equal_nan=True, rtol=1e-5)
    assert np.allclose(a.p, b.p, equal_nan=True, atol=1e-8) and (a.note=='').all() and (b.note=='').all() and b.converged.all()

def test_a_fit_at_the_boundary_says_so():
    r = moderation(moderated(church_sd=0., seeds=2))
    assert r.note.str.contains('boundary').all() and r.set_index('term').estimate['sd of churches']<.005

@pytest.mark.parametrize('spoil,match', [(lambda t: t.drop(columns='area'), 'area'), (lambda t: t.assign(area=0.), 'not positive'), (lambda t: t.drop_duplicates('church'), 'one row'),
                                         (lambda t: t.assign(style='Gothic'), 'one style'), (lambda t: t.assign(shift=np.nan), 'not finite'), (lambda t: t.assign(shift=.1), 'the same')])
def test_tables_that_cannot_be_moderated(spoil, match):
    with pytest.raises(ValueError, match=match): moderation(spoil(moderated(12, 2)))

def test_unknown_reference():
    with pytest.raises(ValueError, match='Rococo'): moderation(moderated(12, 2), 'Rococo')

@pytest.mark.parametrize('family,power,d_z', [(1,.8,.239), (1,.9,.277), (12,.8,.319), (12,.9,.357), (18,.8,.330), (18,.9,.368), (90,.8,.372), (90,.9,.410)])
def test_detectable_effects(family, power, d_z):
    r = detectable_shift(139, .05/family, power, sd=.0315)
    assert r.detectable[0]==pytest.approx(d_z, abs=6e-4) and r.detectable[1]==pytest.approx(r.detectable[0]*.0315)
    assert r.detectable[0]==pytest.approx(TTestPower().solve_power(nobs=139, alpha=.05/family, power=power), abs=1e-6)
    nc = r.detectable[0]*139**.5; edge = stats.t.isf(.025/family, 138)
    assert stats.nct.sf(edge, 138, nc)+stats.nct.cdf(-edge, 138, nc)==pytest.approx(power, abs=1e-5)

@pytest.mark.parametrize('sd,raw', [(.0315,.0104), (.0390,.0129), (.0561,.0185)])
def test_detectable_raw_shifts(sd, raw): assert detectable_shift(139, .05/18, .8, sd).detectable[1]==pytest.approx(raw, abs=6e-5)

def test_power_curve_against_statsmodels_and_simulation():
    for n,alpha in ((139,.05/12), (1000,.05), (5,.01)): # statsmodels gives nan at some effects
        c = power_curve(np.linspace(0, 2, 60), n, alpha); theirs = np.array([TTestPower().power(e, n, alpha) for e in c.d_z]); known = np.isfinite(theirs)
        assert known.sum()>20 and np.allclose(c.power[known], theirs[known], atol=1e-9) and c.power.between(0, 1+1e-12).all() and (c.power.diff()[1:]>-1e-12).all()
    c = power_curve([-.3,0,.1,.3], 50)
    assert c.power[0]==pytest.approx(c.power[3]) and c.power[3]==pytest.approx(TTestPower().power(.3, 50, .05)) and c.power[1]==pytest.approx(.05)
    seen = (stats.ttest_1samp(rng(0).normal(.3, 1, (4000,50)), 0, axis=1).pvalue<.05).mean()
    assert seen==pytest.approx(c.power[3], abs=3*np.sqrt(.25/4000))
    for bad,match in ((dict(n=2),'2 churches'), (dict(alpha=0),'alpha is 0'), (dict(power=.01),'power is 0.01'), (dict(sd=0),'sd is 0')):
        with pytest.raises(ValueError, match=match): detectable_shift(**bad)

# ---- the committed simulation

def test_null_studies_small_and_committed(monkeypatch):
    monkeypatch.syspath_prepend(ROOT/'benchmarks')
    import null_studies
    small = null_studies.null_studies(5); kept = pd.read_csv(ROOT/'results'/'statistics'/'null_studies.csv')
    key = ['shape','measure','method','seed_sd']
    assert [tuple(r) for r in small[key[:3]].to_numpy()]==[tuple(r) for r in kept[key[:3]].to_numpy()] and np.allclose(small.seed_sd, kept.seed_sd)
    off = np.abs(small.rate-kept.rate)/np.sqrt(kept.rate*(1-kept.rate)/small.studies)
    assert (off<4.5).all(), small.assign(off=off)[off>=4.5]
    assert (kept.studies==2000).all() and (kept.n==139).all() and np.allclose(kept.mc_se, np.sqrt(kept.rate*(1-kept.rate)/kept.studies), atol=1e-6)
    real = pd.read_csv(ROOT/'results'/'statistics'/'real_shifts.csv', comment='#')
    assert [*real]==['tier','shift'] and (real.groupby('tier')['shift'].mean().abs()<1e-9).all() and (real.groupby('tier').size()>=50).all() and {f'real, {t}' for t in real.tier}<set(kept['shape'])
