"Statistics against scipy, statsmodels and formulas written out."
import math
import numpy as np, pandas as pd, pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from ssl_wikichurches.iou_stats import by_church, hedges_factor, paired_shift, readable_table, shift_table

def scores(models=('a','b'), tiers=('linear','lora','full'), seeds=(0,1), n=30, photos=1, rng=None):
    rng = rng or np.random.default_rng(0); rows = []
    for m in models:
        before = rng.uniform(.1, .4, n*photos)
        for t in tiers:
            for s in seeds:
                after = before if t=='linear' else before+rng.normal(.01, .03, n*photos)
                rows.append(pd.DataFrame(dict(model=m, tier=t, seed=s, image=[f'Q{i//photos}_wd{i%photos}.jpg' for i in range(n*photos)], church=[f'Q{i//photos}' for i in range(n*photos)], before=before, after=after)))
    return pd.concat(rows, ignore_index=True)

def test_one_comparison_against_scipy():
    g = np.random.default_rng(3); b = g.uniform(0,.4,25); a = b+g.normal(.02,.05,25); d = a-b; r = paired_shift(b, a, seed=7)
    t = d.mean()/(d.std(ddof=1)/5)
    assert r['t']==pytest.approx(t) and r['p']==pytest.approx(2*stats.t.sf(abs(t), 24)) and r['shift']==pytest.approx(d.mean())
    ci = stats.bootstrap((d,), np.mean, method='BCa', n_resamples=9999, rng=np.random.default_rng(7)).confidence_interval
    assert (r['low'],r['high'])==pytest.approx((ci.low,ci.high))
    J = math.gamma(12)/(math.sqrt(12)*math.gamma(11.5))
    assert r['d_z']==pytest.approx(J*d.mean()/d.std(ddof=1)) and r['d_av']==pytest.approx(J*d.mean()/math.sqrt((a.var(ddof=1)+b.var(ddof=1))/2))

@pytest.mark.parametrize('df', [2,5,24,138])
def test_hedges(df): assert hedges_factor(df)==pytest.approx(1-3/(4*df-1), abs=.02 if df<5 else .002)

def test_order_of_churches_does_not_matter():
    g = np.random.default_rng(1); b,a = g.random(20), g.random(20); o = g.permutation(20)
    x,y = paired_shift(b, a), paired_shift(b[o], a[o])
    assert all(x[k]==pytest.approx(y[k]) for k in ('shift','d_z','d_av','t','p'))

def test_degenerate_shifts_are_not_tested():
    r = paired_shift(np.zeros(5), np.zeros(5))
    assert math.isnan(r['p']) and math.isnan(r['low']) and 'same amount' in r['note']
    with pytest.raises(ValueError, match='at least 3'): paired_shift(np.zeros(2), np.ones(2))
    with pytest.raises(ValueError, match='finite'): paired_shift(np.array([0,1,np.nan]), np.zeros(3))

def test_holm_over_all_but_linear():
    t = shift_table(scores()); f = t[t.tier!='linear']
    assert np.allclose(f.p_holm, multipletests(f.p, method='holm')[1]) and t[t.tier=='linear'].p_holm.isna().all() and len(f)==4
    assert (t[t.tier=='linear'].note=='identical by construction').all()

def test_churches_count_not_photographs():
    s = scores(n=12, photos=3); t = shift_table(s)
    assert (t.n==12).all() and (t.seeds==2).all()
    g = s[(s.model=='a')&(s.tier=='full')]
    d = g.assign(d=g.after-g.before).groupby(['church','image']).d.mean().groupby('church').mean()
    assert t[(t.model=='a')&(t.tier=='full')]['shift'].item()==pytest.approx(d.mean()) and len(by_church(g))==12

def test_rows_shuffled_give_the_same_table():
    s = scores(); a,b = shift_table(s), shift_table(s.sample(frac=1, random_state=1))
    key = ['model','tier']
    pd.testing.assert_frame_equal(a.sort_values(key, ignore_index=True), b.sort_values(key, ignore_index=True))

@pytest.mark.parametrize('spoil,match', [
    (lambda s: s.drop(columns='church'), 'church'), (lambda s: s.assign(after=s.after.where(s.index!=70)), 'not finite'), (lambda s: pd.concat([s, s.iloc[:1]]), 'twice'),
    (lambda s: s.drop(index=100), 'different images'), (lambda s: s.assign(church=s.church.where(s.index!=3,'Q99')), '2 churches'),
    (lambda s: s.assign(after=s.after+1e-9*((s.tier=='linear')&(s.model=='b')&(s.seed==1)&(s.image=='Q4_wd0.jpg'))), 'linear probe of b')])
def test_bad_tables(spoil, match):
    with pytest.raises(ValueError, match=match): shift_table(spoil(scores()))

def test_readable_table_signs_and_bounds():
    text = readable_table(shift_table(scores(n=60)))
    assert text['shift'].str.match(r'^[+-]0\.\d{4}$|^0$').all() and not text.isna().any().any()
