"Statistics against scipy, statsmodels and formulas written out."
import math
import numpy as np, pandas as pd, pytest
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW
from ssl_wikichurches.attention.scores import read_boxes, read_maps, score_maps
from ssl_wikichurches.stats import shift as iou_stats
from ssl_wikichurches.stats.shift import bca_interval, by_church, equivalence_p, hedges_factor, mean_squares, paired_shift, pair_scores, readable_table, resampled_means, shift_table, shift_test

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
    g = np.random.default_rng(3); b = g.uniform(0,.4,25); a = b+g.normal(.02,.05,25); d = a-b; r = paired_shift(b, a)
    t = d.mean()/(d.std(ddof=1)/5)
    assert r['t']==pytest.approx(t) and r['p']==pytest.approx(2*stats.t.sf(abs(t), 24)) and r['shift']==pytest.approx(d.mean())
    ci = stats.ttest_1samp(d, 0).confidence_interval(.95)
    assert (r['low'],r['high'])==pytest.approx((ci.low,ci.high)) and r['over']=='one model' and r['df']==24
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

# ---- the bootstrap of a family

def family(name, n=139, k=5):
    g = np.random.default_rng(k)
    return {'normal':lambda: g.normal(.01, .04, (n,k)), 'skewed':lambda: g.gamma(.5, .04, (n,k)), 'heavy':lambda: g.standard_t(2, (n,k))*.02, 'zeros':lambda: g.normal(0, .04, (n,k))*(g.random((n,k))<.3),
            'one moved':lambda: (np.arange(n)==7)[:,None]*np.linspace(.1, 1, k), 'far':lambda: 1e6+g.normal(0, 1e-3, (n,k)), 'tiny':lambda: 1e-7*g.normal(size=(n,k))}[name]()

def scipy_bca(x, seed=0, n_resamples=9999, level=.95):
    return stats.bootstrap((x,), np.mean, method='BCa', n_resamples=n_resamples, confidence_level=level, rng=np.random.default_rng(seed))

@pytest.mark.parametrize('name', ['normal','skewed','heavy','zeros','far','tiny'])
@pytest.mark.parametrize('n,seed,resamples,level', [(139,0,9999,.95), (60,3,1999,.8), (30,1,999,.99)])
def test_bca_of_a_family_is_scipys_column_by_column(name, n, seed, resamples, level):
    x = family(name, n); low,high = bca_interval(x, seed, resamples, level)
    for k in range(x.shape[1]):
        r = scipy_bca(x[:,k], seed, resamples, level)
        ties = (np.abs(r.bootstrap_distribution-x[:,k].mean())<1e-9*x[:,k].std()).sum() # scipy's rounding breaks them by chance, `bca_interval` counts them as halves
        assert (low[k],high[k])==pytest.approx(tuple(r.confidence_interval), rel=1e-9, abs=(.02*ties+1e-9)*x[:,k].std())
        assert ties<(3 if name=='zeros' else 1)

@pytest.mark.parametrize('name', ['normal','skewed','heavy','zeros'])
def test_bca_ends_of_one_bootstrap_distribution(name):
    x = family(name)[:,:1]
    for resamples in (99,1000,4999):
        theirs = scipy_bca(x[:,0], 5, resamples)
        ours = iou_stats._bca_ends(theirs.bootstrap_distribution[:,None]-x.mean(0), x, .95)[:,0]
        assert np.abs(ours-[*theirs.confidence_interval]).max()<=1e-13*np.abs(x).max()

def test_bca_agrees_with_other_resamples_but_for_chance():
    x = family('skewed', k=12); low,high = bca_interval(x)
    ends = np.array([[*scipy_bca(c, 100+k).confidence_interval] for k,c in enumerate(x.T)]).T
    assert np.abs(np.array([low,high])-ends).max()<.15*(x.std(0)/139**.5).max()

def test_bca_where_one_church_moved():
    "Means tie in thousands, and with the observed one: scipy's rounding breaks those ties by chance, so the resamples are counted here."
    x = family('one moved')[:,-1]; m = np.random.default_rng(0).integers(0, 139, (9999,139)); hits = (m==7).sum(1)
    z0 = stats.norm.ppf(((hits<1).mean()+(hits<=1).mean())/2); c = x-x.mean(); a = (c**3).sum()/6/(c**2).sum()**1.5
    z = z0+stats.norm.ppf([.025,.975]); q = stats.norm.cdf(z0+z/(1-a*z))
    assert bca_interval(x)==pytest.approx(np.quantile(hits/139, q))

def test_bca_of_what_does_not_vary_and_of_what_is_no_family():
    x = np.c_[np.zeros(9),np.full(9,.1),np.arange(9.)]; low,high = bca_interval(x)
    assert np.isnan(low[:2]).all() and np.isnan(high[:2]).all() and (low[2],high[2])==pytest.approx(tuple(bca_interval(np.arange(9.))))
    assert np.isnan(bca_interval(np.zeros(5))).all()
    for bad,match in (((np.zeros((2,3)),),'at least 3'), ((np.zeros((3,3,3)),),'churches'), (([0,1,np.inf],),'not finite'), (([0,1,2],0,9999,95),'level'), (([0,1,2],0,9),'at least 99')):
        with pytest.raises(ValueError, match=match): bca_interval(*bad)

def test_resampled_means_whatever_was_asked_before():
    x = family('normal', 300, 2); first = resampled_means(x, 700, 4)
    for n,r,s in ((300,700,5),(299,700,4),(300,256,4),(300,257,4)): resampled_means(x[:n], r, s)
    rows = np.random.default_rng(4).integers(0, 300, (700,300))
    assert np.array_equal(first, resampled_means(x, 700, 4)) and np.allclose(first, x[rows].mean(1), atol=1e-15)
    assert np.allclose(first[:257], resampled_means(x, 257, 4), atol=1e-15)

def test_table_and_one_comparison_give_the_same_row():
    s = scores(); t = shift_table(s, seed=3).set_index(['model','tier'])
    for key,g in s[s.tier!='linear'].groupby(['model','tier']):
        grid = g.pivot(index='church', columns='seed', values=['before','after']); r = paired_shift(grid['before'], grid['after'])
        assert all(t.loc[key][k]==pytest.approx(r[k], rel=1e-12) for k in ('n','before','after','shift','low','high','d_z','d_av','t','df','p'))
        c = by_church(g); alone = stats.ttest_rel(c.after, c.before); bca = scipy_bca((c.after-c.before).to_numpy(), 3).confidence_interval
        assert t.loc[key].models_p==pytest.approx(alone.pvalue) and (t.loc[key].models_low,t.loc[key].models_high)==pytest.approx(tuple(alone.confidence_interval(.95)))
        assert (t.loc[key].bca_low,t.loc[key].bca_high)==pytest.approx(tuple(bca), rel=1e-9)

def test_mean_squares_are_those_of_an_analysis_of_variance():
    x = np.random.default_rng(2).normal(.01, .04, (30,4)); squares,dfs = mean_squares(x)
    long = pd.DataFrame([dict(i=i, k=k, y=x[i,k]) for i in range(30) for k in range(4)])
    m = anova_lm(ols('y ~ C(i)+C(k)', long).fit())
    assert np.allclose(squares, (m.sum_sq/m.df)[['C(i)','C(k)','Residual']]) and np.allclose(dfs, m.df[['C(i)','C(k)','Residual']])
    many = np.stack([x, x[::-1]*2]); assert np.allclose(mean_squares(many)[0], [squares, 4*squares])

@pytest.mark.parametrize('k', [1,2,3,5])
def test_interval_and_p_of_a_row_say_the_same(k):
    "The interval excludes zero exactly where p is below .05; at the level 1-p it ends at zero."
    g = np.random.default_rng(k); found = shift_test(g.normal(.004, .02, (200,20,1))+g.normal(0, .006, (200,1,k))+g.normal(0, .01, (200,20,k)))
    assert ((found['low']*found['high']>0)==(found['p']<.05)).all() and 5<(found['p']<.05).sum()<195
    for i in range(5):
        one = np.random.default_rng(i).normal(.01, .02, (20,k)); r = shift_test(one); edge = shift_test(one, 1-r['p'])
        assert min(abs(edge['low']), abs(edge['high']))<1e-9

def test_two_seeds_never_explode():
    "Churches and seeds have a fifth of the variance: the bare degrees of freedom fall below .01, and an interval by them is 1e150 wide."
    x = .01+.04*(np.random.default_rng(34).normal(0, .2**.5, (500,139,1))+np.random.default_rng(1034).normal(0, .8**.5, (500,139,2)))
    squares,dfs = mean_squares(x); total = squares@[1,1,-1]; bare = total**2/(squares**2/dfs).sum(-1)
    worst = bare.argmin()
    assert 2*stats.t.ppf(.975, bare[worst])*np.sqrt(total[worst]/278)>1e9
    found = shift_test(x)
    assert found['df'].min()>=1 and (found['high']-found['low']).max()<.3 and found['high'][worst]-found['low'][worst]<.02
    assert (found['se']>=np.sqrt(squares[:,:2].max(-1)/278)-1e-12).all()

def test_a_recipe_keeps_its_level_and_one_model_does_not():
    g = np.random.default_rng(0); shape = (2000,40)
    def false_alarms(k, seed_sd): # per study; seed_sd in standard errors over churches
        d = g.normal(0, .04, (*shape,1))+g.normal(0, seed_sd*.04/40**.5, (2000,1,k))+g.normal(0, .01, (*shape,k))
        return (shift_test(d)['p']<.05).mean(),(shift_test(d.mean(-1, keepdims=True))['p']<.05).mean()
    noise = 3*np.sqrt(.05*.95/2000)
    for k in (2,3,5):
        for seed_sd in (0,1): assert false_alarms(k, seed_sd)[0]<.05+noise+.01
        recipe,models = false_alarms(k, 3) # two seeds are too few where they vary so much, and better than none all the same
        assert recipe<{2:.14, 3:.1, 5:.07}[k] and models>.2 and recipe<.4*models

def test_holm_over_the_declared_family_only():
    s = scores(); t = shift_table(s, family=[('a','lora'),('b','lora')]); inside = t[t.tier=='lora']
    assert np.allclose(inside.p_holm, multipletests(inside.p, method='holm')[1]) and t[t.tier=='full'].p_holm.isna().all() and t[t.tier=='full'].p.notna().all()

def test_one_seed_is_one_model():
    t = shift_table(scores(seeds=(3,))); t = t[t.tier!='linear']
    assert (t.over=='one model').all() and np.allclose(t.low, t.models_low) and np.allclose(t.p, t.models_p) and (shift_table(scores()).over.iloc[1:3]=='churches and seeds').all()

def test_equivalence_over_churches_and_seeds():
    x = np.random.default_rng(1).normal(.001, .02, (60,1))+np.random.default_rng(2).normal(0, .004, (60,3)); found = shift_test(x, .9)
    for margin in (.002,.004,.008,.02): assert (equivalence_p(found, margin)<.05)==(-margin<found['low'] and found['high']<margin)
    one = shift_test(x[:,:1]); assert equivalence_p(one, .01)==pytest.approx(DescrStatsW(x[:,0]).ttost_mean(-.01, .01)[0])

def test_two_churches_make_no_table_but_of_the_control():
    with pytest.raises(ValueError, match='at least 3'): shift_table(scores(n=2))
    assert (shift_table(scores(n=2, tiers=('linear',))).note=='identical by construction').all()

# ---- scores from elsewhere

def foreign(n=20, k=0): return pd.DataFrame(dict(image=[f'{i:04}' for i in range(n)], value=np.random.default_rng(k).random(n)))

@pytest.mark.parametrize('files', [False,True])
def test_scores_from_elsewhere_match_by_name(tmp_path, files):
    b = foreign(); runs = pd.concat([foreign(k=10+i).assign(model='m', tier=t, seed=s) for i,(t,s) in enumerate([('lora',0),('lora',1),('full',0),('full',1)])])
    shuffled = runs.sample(frac=1, random_state=0)
    if files:
        for name,t in (('b',b),('a',shuffled)): t.to_csv(tmp_path/f'{name}.csv', index=False)
    t = shift_table(pair_scores(*((tmp_path/'b.csv',str(tmp_path/'a.csv')) if files else (b,shuffled)))).set_index('tier')
    for tier,g in runs.groupby('tier'):
        after = g.groupby('image').value.mean(); r = stats.ttest_rel(after, b.set_index('image').value.loc[after.index])
        assert t.loc[tier,'models_p']==pytest.approx(r.pvalue) and t.loc[tier,'over']=='churches and seeds' and t.loc[tier,'n']==20 and t.loc[tier,'seeds']==2

def test_scores_of_two_models_meet_their_own_baseline():
    b = pd.concat([foreign(k=i).assign(model=m) for i,m in enumerate('xy')]); a = pd.concat([foreign(k=5+i).assign(model=m, tier='lora') for i,m in enumerate('xy')])
    t = shift_table(pair_scores(b, a)).set_index('model')
    for i,m in enumerate('xy'): assert t.loc[m,'shift']==pytest.approx(foreign(k=5+i).value.mean()-foreign(k=i).value.mean())
    one = shift_table(pair_scores(foreign(), a)).set_index('model') # one baseline for both
    assert one.loc['y','before']==pytest.approx(foreign().value.mean())
    with pytest.raises(ValueError, match='20 scores more than once'): pair_scores(b, foreign())
    with pytest.raises(ValueError, match='20 images of after are not in before'): pair_scores(b[b.model=='x'], a)

def test_churches_of_scores_from_elsewhere():
    b = foreign().assign(church=[f'Q{i//2}' for i in range(20)])
    assert shift_table(pair_scores(b, foreign(k=1))).n.item()==10 and shift_table(pair_scores(foreign(), b.assign(value=foreign(k=1).value))).n.item()==10
    assert shift_table(pair_scores(foreign(), foreign(k=1))).n.item()==20
    with pytest.raises(ValueError, match='1 images have another church before than after, first 0003'): pair_scores(b, b.assign(church=b.church.where(b.image!='0003', 'Q99')))

def test_scores_of_a_run_with_metrics_blocks_and_heads():
    full = pd.concat([foreign(k=10*i+j).assign(metric=m, block=k, head=h, chance=.05, ceiling=.9) for i,m in enumerate(['iou@90','auroc']) for j,(k,h) in enumerate([(10,'mean'),(11,'mean'),(11,'0')])])
    moved = full.assign(value=full.value+.1)
    s = pair_scores(full, moved, dict(metric='auroc', block=11, head=0))
    assert len(s)==20 and np.allclose(np.sort(s.before), np.sort(foreign(k=12).value)) and np.allclose(s.after-s.before, .1)
    for only,match in ((None,'2 values of metric'), (dict(metric='auroc'),'2 values of block'), (dict(metric='auroc', block=9),'no rows with block 9'), (dict(layer=3),"lacks the columns .'layer'.")):
        with pytest.raises(ValueError, match=match): pair_scores(full, moved, only)

@pytest.mark.parametrize('spoil,match', [
    (lambda a: a[3:], r'3 images of before are not in after \(first 0000\)'), (lambda a: a.assign(image=a.image.str.replace('0001','x')), r'1 images of before are not in after \(first 0001\) and 1 images of after are not in before \(first x\)'),
    (lambda a: pd.concat([a, a[4:6]]), 'after has 2 scores more than once, first of image 0004: expected one per image'), (lambda a: a.assign(value=a.value.where(a.image!='0007')), 'after has 1 scores that are no finite number, first of image 0007'),
    (lambda a: a.assign(value=a.value.astype(str).where(a.image!='0007','?')), '0007'), (lambda a: a.assign(value=np.inf), '20 scores'), (lambda a: a.rename(columns=dict(image='file')), "lacks the columns .'image'."), (lambda a: a[:0], 'holds no scores'),
    (lambda a: a.assign(image=a.image.where(a.image!='0002')), '1 rows without image'), (lambda a: a.assign(seed=[0.,np.nan]*10), '10 rows without seed'),
    (lambda a: pd.concat([a.assign(seed=0), a[1:].assign(seed=1)]), 'different images'), (lambda a: a.assign(tier='linear'), 'not measured alike')])
def test_scores_from_elsewhere_that_do_not_fit(spoil, match):
    with pytest.raises(ValueError, match=match): shift_table(pair_scores(foreign(), spoil(foreign(k=1))))

def test_a_baseline_with_two_runs_is_refused():
    with pytest.raises(ValueError, match='before has 20 scores more than once'): pair_scores(pd.concat([foreign().assign(seed=s) for s in (0,1)]), foreign(k=1))

def test_maps_from_elsewhere(tmp_path):
    "Two maps of each of eight photographs, by another program; the second kind is a little brighter in the boxes."
    g = np.random.default_rng(4); rows,columns = np.divmod(np.arange(64), 8); corners = g.integers(0, 4, (8,2)) # boxes of four by three cells of eight pixels
    names = [f'{i}.jpg' for i in range(8)]; noise = g.random((8,64))
    pd.DataFrame([dict(image=i, left=8*x, top=8*y, right=8*x+32, bottom=8*y+24) for i,(x,y) in zip(names, corners)]).to_csv(tmp_path/'boxes.csv', index=False)
    for name,gain in dict(before=0, after=.5).items():
        values = noise+[gain*((columns>=x)&(columns<x+4)&(rows>=y)&(rows<y+3)) for x,y in corners]
        pd.DataFrame(dict(image=np.repeat(names, 64), row=np.tile(rows, 8), column=np.tile(columns, 8), value=values.ravel())).to_csv(tmp_path/f'{name}.csv', index=False)
    found,before = read_maps(tmp_path/'before.csv'); _,after = read_maps(tmp_path/'after.csv', found); boxes,_ = read_boxes(tmp_path/'boxes.csv', found)
    first,second = (score_maps(m, boxes, found, size=64) for m in (before, after))
    for metric,sign in {'iou@90':1, 'auroc':1, 'emd':-1}.items(): # of the distance, less is better
        t = shift_table(pair_scores(first, second, only=dict(metric=metric)))
        assert t.n.item()==8 and t['shift'].item()*sign>0
