"Measures against independent oracles (scikit-learn, scipy, linear programming, brute force), and what must and must not move them."
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy.optimize import linprog
from scipy.stats import entropy, hypergeom, pearsonr, wasserstein_distance_nd, zscore
from sklearn.metrics import average_precision_score, jaccard_score, roc_auc_score
from ssl_wikichurches.attention.capture import regrid
from ssl_wikichurches.attention.baselines import baseline_maps, center_maps, center_widths, derangement, edge_maps, mask_maps, other_maps, prior_maps, random_maps, uniform_maps
from ssl_wikichurches.data.churches import box_mask
from ssl_wikichurches.attention.saliency_metrics import (EPS, area_matched_iou, average_precision, average_precision_chance, best_box, best_iou_chance, box_masks, box_scores,
    correlation, dilate, emd, hits_by_box, information_gain, kinds_of, kl_divergence, loo_prior, mass_iou, n_holding, nss, pointing_game, rank_accuracy, shuffled_auroc,
    shuffled_auroc_ceiling, similarity, soft_target)
from ssl_wikichurches.attention.metrics import find_places, iou_chance, iou_of_top, rank_pixels, shares

def drawn_case(seed, h, w, ties):
    "A map, a mask that is neither empty nor full, and how often a pixel is in boxes of others."
    g = np.random.default_rng(seed); n = h*w
    heat = (g.integers(0,4,(h,w)) if ties else g.random((h,w)))+.01
    mask = np.zeros(n, bool); mask[g.choice(n, g.integers(1,n), replace=False)] = True
    others = g.integers(0,3,(h,w)); others.flat[g.integers(n)] = 2
    return heat,mask.reshape(h,w),others
cases = given(st.integers(0,10**6), st.integers(2,8), st.integers(2,8), st.booleans())
many = settings(max_examples=100, deadline=None)
T = torch.tensor
close = lambda x, y, tol=1e-9: np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=tol, rtol=0)
def top(heat, k): # the k largest, earlier pixels first
    kept = np.zeros(heat.size, bool); kept[sorted(range(heat.size), key=lambda i: (-heat.flat[i], i))[:k]] = True
    return kept

# ---- oracles

@many
@cases
def test_metrics_of_ranking(seed, h, w, ties):
    heat,mask,others = drawn_case(seed, h, w, ties); t,m,flat = T(heat),T(mask),mask.ravel()
    kept = top(heat, flat.sum())
    close(rank_accuracy(t, m), kept[flat].mean()); close(area_matched_iou(t, m), jaccard_score(flat, kept))
    close(average_precision(t, m), average_precision_score(flat, heat.ravel()))
    again = np.concatenate([heat[mask], np.repeat(heat.ravel(), others.ravel())])
    close(shuffled_auroc(t, m, T(others)), roc_auc_score(np.arange(len(again))<flat.sum(), again))
    places = find_places(rank_pixels(t), m)
    for f in (rank_accuracy, area_matched_iou, average_precision, mass_iou): assert torch.equal(f(t, m, places=places), f(t, m))
    for k in range(1, h*w+1): close(iou_of_top(places, k), jaccard_score(flat, top(heat, k)))

@many
@cases
def test_metrics_of_values(seed, h, w, ties):
    heat,mask,others = drawn_case(seed, h, w, ties); t,m = T(heat),T(mask)
    target = mask/mask.sum(); p = heat/heat.sum()
    if np.ptp(heat)>0:
        close(nss(t, m), zscore(heat, axis=None)[mask].mean())
        close(correlation(t, T(target)), pearsonr(heat.ravel(), target.ravel()).statistic)
    close(kl_divergence(t, T(target)), entropy(target.ravel(), ((1-EPS)*p+EPS/p.size).ravel()))
    close(similarity(t, T(target)), 1-np.abs(p-target).sum()/2)
    prior = (others+1)/(others+1).sum()
    close(information_gain(t, m, T(prior)), np.mean([np.log2(((1-EPS)*p[i]+EPS/p.size)/prior[i]) for i in zip(*np.nonzero(mask))]))
    best = [i for i in np.ndindex(h, w) if heat[i]==heat.max()]
    for tol in (0,1,1.5,2.3):
        near = np.array([[((np.argwhere(mask)-[y,x])**2).sum(1).min()<=tol**2 for x in range(w)] for y in range(h)])
        assert (dilate(m, tol).numpy()==near).all()
        close(pointing_game(t, m, tol), np.mean([near[i] for i in best]))

@many
@cases
def test_mass_is_the_smallest_set(seed, h, w, ties):
    heat,mask,_ = drawn_case(seed, h, w, ties); t,m = T(heat),T(mask)
    for mass in (.1,.6,.95,1.):
        k = next(k for k in range(1, heat.size+1) if heat.ravel()[top(heat, k)].sum()>=heat.sum()*(mass-1e-9))
        assert n_holding(t, mass).item()==k
        close(mass_iou(t, m, mass), jaccard_score(mask.ravel(), top(heat, k)))

def by_program(p, t, cost):
    "Transport as a linear program (HiGHS), without POT."
    n = len(p)
    rows = np.kron(np.eye(n), np.ones(n)),np.kron(np.ones(n), np.eye(n))
    return linprog(cost.ravel(), A_eq=np.vstack(rows), b_eq=np.r_[p,t], method='highs').fun

@settings(max_examples=25, deadline=None)
@given(st.integers(0,10**6), st.integers(2,5))
def test_emd_against_two_other_solvers(seed, g):
    r = np.random.default_rng(seed); n = g*g
    p,t = r.random(n)**3,r.random(n)*(r.random(n)>.5); t[r.integers(n)] = 1; p,t = p/p.sum(),t/t.sum()
    at = (np.stack(np.meshgrid(np.arange(g), np.arange(g), indexing='ij'), -1).reshape(n, 2)+.5)/g
    cost = np.linalg.norm(at[:,None]-at, axis=-1)
    found = emd(T(p).reshape(g,g), T(t).reshape(g,g)).item()
    close(found, by_program(p, t, cost), 1e-7)
    if g<=3: close(found, wasserstein_distance_nd(at, at, p, t), 1e-7)
    close(found, emd(T(t).reshape(g,g), T(p).reshape(g,g)).item(), 1e-9); close(found, emd(T(p).reshape(g,g)*3, T(t).reshape(g,g), T(p)).item(), 1e-12)

@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0,9), min_size=6, max_size=6))
def test_emd_of_points_and_triangle(c):
    def at(y, x): return torch.zeros(10,10, dtype=torch.double).index_put((T(y),T(x)), T(1.).double())
    a,b,d = at(*c[:2]),at(*c[2:4]),at(*c[4:])
    close(emd(a, b), np.hypot(c[0]-c[2], c[1]-c[3])/10)
    assert emd(a, d).item()<=emd(a, b).item()+emd(b, d).item()+1e-12
    close(emd((a+b)/2, d), (emd(a, d)+emd(b, d))/2)

@many
@given(st.integers(0,10**6), st.integers(1,5), st.integers(2,7), st.booleans())
def test_box_by_box(seed, b, s, ties):
    g = np.random.default_rng(seed)
    heat,_,_ = drawn_case(seed, s, s, ties)
    corners = g.integers(0, s, (b,2)); boxes = T(np.concatenate([corners, corners+g.integers(1, s+1, (b,2))], 1)).float().clamp(max=s)
    masks = box_masks(boxes, s); assert len(masks)==b and torch.equal(masks.any(0), box_mask(boxes, s))
    for q in (0,50,75):
        k = round(s*s*(100-q)/100); kept = top(heat, k)
        found = [[(kept&m).sum()/m.sum(), (kept&m).sum()/k, jaccard_score(m, kept), heat.ravel()[m].sum()/heat.sum()] for m in masks.flatten(1).numpy()]
        for of,want in zip(('recall','precision','iou','coverage'), zip(*found)):
            close(box_scores(T(heat), masks, of, q), want); close(best_box(T(heat), masks, of, q), max(want))

@many
@given(st.integers(0,10**6), st.integers(1,20), st.integers(2,7), st.sampled_from([.1,.5,.9]))
def test_kinds_of_pixels_against_a_loop(seed, b, s, share):
    "Also of many boxes, of masks that are no boxes, and where no pixel lies outside."
    g = np.random.default_rng(seed); masks = g.random((b,s,s))<share; masks[:,0,0] = True; flat = masks.reshape(b, -1)
    of = {}
    for i in range(s*s): of.setdefault(tuple(flat[:,i]), []).append(i)
    kinds,found = [*sorted(of)],kinds_of(T(masks))
    assert [tuple(r) for r in found.boxes.tolist()]==kinds and found.sizes.tolist()==[len(of[k]) for k in kinds] and all(found.of[i]==j for j,k in enumerate(kinds) for i in of[k])
    assert found.by_box(found.sizes).tolist()==flat.sum(1).tolist()
    heat = g.integers(0, 5, (3,s,s)); k = s*s//2; ranking = rank_pixels(T(heat).float())
    assert hits_by_box(ranking, T(masks), k).tolist()==[[(top(h, k)&m).sum() for m in flat] for h in heat]
    drawn = np.random.default_rng(3).multivariate_hypergeometric([len(of[i]) for i in kinds], k:=round(s*s*.3), size=50, method='marginals')
    want = np.mean([max(h/(k+m.sum()-h) for m,h in zip(flat, sum(n*np.array(i) for n,i in zip(row, kinds)))) for row in drawn])
    close(best_iou_chance(T(masks), 70, draws=50, seed=3), want, 1e-12)

def test_soft_target_by_hand():
    m = torch.zeros(4,4, dtype=torch.bool); m[0,:3] = m[3,3] = True
    assert soft_target(m, 2).tolist()==[[.5,.25],[0,.25]]
    close(soft_target(m, 8), m.repeat_interleave(2, 0).repeat_interleave(2, 1)/16)
    close(soft_target(m, 3), [[1/3,1/3,1/12],[0,0,0],[0,0,1/4]]) # a cell is 4/3 pixels wide

# ---- chance and ceiling

@settings(max_examples=30, deadline=None)
@given(st.integers(1,7), st.integers(0,6))
def test_chance_of_average_precision_by_enumeration(area, more):
    n = area+more
    from itertools import combinations
    every = [average_precision(-torch.arange(float(n))[None], torch.zeros(n, dtype=torch.bool).index_fill(0, T(c), True)[None]).item() for c in combinations(range(n), area)]
    close(average_precision_chance(area, n), np.mean(every))

def test_random_maps_are_at_the_blind_level():
    g = torch.Generator().manual_seed(0); x = torch.rand(6000,10,10, generator=g, dtype=torch.double)
    boxes = T([[3.,2,8,5],[0,0,2,2],[7,4,10,9]]); parts = box_masks(boxes, 10); mask = parts.any(0); others = torch.rand(10,10, generator=g)
    area,n = int(mask.sum()),100
    def near(values, level): assert values.mean().item()==pytest.approx(level, abs=4*values.std().item()/len(values)**.5)
    near(rank_accuracy(x, mask), area/n); near(area_matched_iou(x, mask), iou_chance(area, n, 100-area)); near(average_precision(x, mask), average_precision_chance(area, n))
    near(shuffled_auroc(x, mask, others), .5); near(nss(x, mask), 0.); near(pointing_game(x, mask, 1), dilate(mask, 1).double().mean().item())
    near(box_scores(x, parts, 'recall', 80).mean(-1), .2); near(best_box(x, parts, 'iou', 80), best_iou_chance(parts, 80, draws=200_000))
    assert best_iou_chance(parts[:1], 80, draws=200_000)==pytest.approx((hypergeom(100, 15, 20).pmf(np.arange(16))*np.arange(16)/(35-np.arange(16))).sum(), abs=1e-3)

@many
@cases
def test_no_map_beats_its_ceiling(seed, h, w, ties):
    heat,mask,others = drawn_case(seed, h, w, ties); t,m = T(heat),T(mask); g = mask.mean()
    ceiling = shuffled_auroc_ceiling(m, T(others))
    assert shuffled_auroc(t, m, T(others)).item()<=ceiling+1e-12 and ceiling>=.5
    assert nss(t, m).item()<=((1-g)/g)**.5+1e-9
    close(nss(m*1., m), ((1-g)/g)**.5)
    best = np.argsort(-(1+heat)*(mask*10+1), axis=None) # an order with the mask first
    assert shuffled_auroc(T(-np.argsort(best).reshape(h,w)), m, T(others)).item()<=ceiling+1e-12
    prior = T((others+1)/(others+1).sum())
    assert information_gain(t, m, prior).item()<=information_gain(m*1., m, prior).item()+1e-9

# ---- what must hold

@many
@cases
def test_perfect_complement_and_constant(seed, h, w, ties):
    _,mask,others = drawn_case(seed, h, w, ties); m = T(mask); g = mask.mean(); perfect,flat = m.double(),torch.full((h,w), .3).double()
    target = perfect/perfect.sum()
    for f in (rank_accuracy, area_matched_iou, average_precision, pointing_game): close(f(perfect, m), 1)
    close(mass_iou(perfect, m, 1.), 1); close(similarity(perfect, target), 1); close(kl_divergence(perfect, target, 0), 0); close(emd(perfect, target), 0)
    for f in (pointing_game, mass_iou): close(f(1-perfect, m), 0)
    assert rank_accuracy(1-perfect, m).item()==max(0, 2*mask.sum()-mask.size)/mask.sum() # what must be filled up with pixels in boxes
    close(similarity(1-perfect, target), 0)
    close(correlation(perfect, target), 1); close(correlation(1-perfect, target), -1)
    close(average_precision(flat, m), g); close(pointing_game(flat, m), g); close(shuffled_auroc(flat, m, T(others)), .5)
    assert nss(flat, m).item()==correlation(flat, target).item()==0
    close(kl_divergence(flat, target), np.log(mask.size)-entropy(target.numpy().ravel()))

def every(x, m, others, prior): # all metrics of a map of pixels
    t = m.double()/m.sum()
    return dict(rank=rank_accuracy(x, m), area=area_matched_iou(x, m), ap=average_precision(x, m), point=pointing_game(x, m, 1), nss=nss(x, m), shuffled=shuffled_auroc(x, m, others), cc=correlation(x, t),
                mass=mass_iou(x, m), kl=kl_divergence(x, t), sim=similarity(x, t), emd=emd(x, t), gain=information_gain(x, m, prior), cover=best_box(x, m[None], 'coverage'))
RANKED,AFFINE = ('rank','area','ap','point','shuffled'),('nss','cc')

@settings(max_examples=40, deadline=None)
@given(st.integers(0,10**6), st.integers(3,8))
def test_what_moves_a_metric_and_what_does_not(seed, s):
    heat,mask,others = drawn_case(seed, s, s, False); x,m,o = T(heat),T(mask),T(others); prior = (o+1)/(o+1.).sum()
    base,double,lifted,bent = (every(y, m, o, prior) for y in (x, 2*x, x*3+1, x**3))
    for k in base: close(base[k], double[k], 1e-12)
    for k in RANKED: close(base[k], lifted[k], 1e-12); close(base[k], bent[k], 1e-12)
    for k in AFFINE: close(base[k], lifted[k], 1e-9); assert abs(base[k]-bent[k])>1e-9
    for k in ('kl','sim','gain','cover','emd'): assert abs(base[k]-lifted[k])>1e-9, k
    for d in ((-1,),(-2,),(-2,-1)): # flip both
        flipped = every(x.flip(d), m.flip(d), o.flip(d), prior.flip(d))
        for k in base: close(base[k], flipped[k], 1e-9)
    turned = every(x.T.contiguous(), m.T.contiguous(), o.T.contiguous(), prior.T.contiguous())
    for k in base: close(base[k], turned[k], 1e-9)
    assert base['kl']>=0 and 0<=base['sim']<=1 and base['emd']>=0

@many
@given(st.integers(0,10**6), st.integers(2,6))
def test_divergence_is_zero_only_for_equal_maps(seed, g):
    r = np.random.default_rng(seed); p,t = (T(r.dirichlet(np.ones(g*g))).reshape(g,g) for _ in range(2))
    assert kl_divergence(p, t).item()>0 and abs(kl_divergence(t, t, 0).item())<1e-12
    for bound in (EPS,.1): assert kl_divergence(1-(t==t.max())*1., (t==t.max())*1., bound).item()==pytest.approx(np.log(g*g/bound), rel=1e-9)

def test_many_maps_at_once_equal_one_by_one():
    g = torch.Generator().manual_seed(4); x = torch.rand(2,3,4,6,6, generator=g).double(); x[0,0] = (x[0,0]*3).round()+.1
    m,o = torch.rand(6,6, generator=g)>.7,torch.rand(6,6, generator=g); prior = (o+.1).double(); prior /= prior.sum()
    whole = every(x, m, o, prior)
    for i in np.ndindex(2,3,4):
        one = every(x[i], m, o, prior)
        for k in whole: assert whole[k].shape==(2,3,4) and whole[k].dtype==torch.double; close(whole[k][i], one[k], 1e-12)
    masks = torch.rand(2,1,1,6,6, generator=g)>.6 # a target per image
    close(kl_divergence(x, soft_target(masks, 6)), torch.stack([kl_divergence(x[i], soft_target(masks[i,0,0], 6)) for i in range(2)]), 1e-12)

@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64])
def test_sums_are_exact_in_every_precision(dtype):
    "Half precision would lose a sum of 50,176 pixels."
    x = torch.full((224,224), .01).to(dtype); m = torch.zeros(224,224, dtype=torch.bool); m[:112] = True
    close(best_box(x, m[None], 'coverage'), .5, 1e-12); assert n_holding(x, .5).item()==224*112 and nss(x, m).item()==0

# ---- prior

def some(n=5, s=24, L=2, H=3, g=6, seed=7):
    r = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, s-8, (n,3,2), generator=r).float(); boxes = list(torch.cat([corner, corner+torch.randint(3, 9, (n,3,2), generator=r)], -1))
    return torch.rand(n,L,H,g,g, generator=r)**3, torch.stack([box_mask(b, s) for b in boxes]), boxes, list('abcdefghij'[:n])

def test_prior_leaves_the_church_out():
    _,masks,_,_ = some(); groups = list('aabbc'); p = loo_prior(masks, groups, eps=.2)
    close(p.sum((1,2)), np.ones(5))
    for i in range(5):
        rest = [masks[j].double()/masks[j].sum() for j in range(5) if groups[j]!=groups[i]]
        close(p[i], .8*sum(rest)/len(rest)+.2/24**2, 1e-12)
    other = masks.clone(); other[1] = ~other[1]
    assert torch.equal(loo_prior(other, groups)[0], loo_prior(masks, groups)[0]) and not torch.equal(loo_prior(other, groups)[2], loo_prior(masks, groups)[2])

@settings(max_examples=40, deadline=None)
@given(st.integers(0,10**6), st.integers(2,9), st.integers(2,7), st.booleans())
def test_shuffled_auroc_of_one_map_for_all_is_one_half(seed, n, s, ties):
    "Exactly, in the mean over images: each pair is counted once from either side."
    heat,_,_ = drawn_case(seed, s, s, ties); g = np.random.default_rng(seed+1)
    masks = g.random((n,s,s))>.7; masks[np.arange(n), g.integers(s, size=n), g.integers(s, size=n)] = True; masks = T(masks)
    close(np.mean([shuffled_auroc(T(heat), m, o).item() for m,o in zip(masks, loo_prior(masks, eps=0))]), .5, 1e-12)

# ---- baselines

def test_baselines_are_what_they_say():
    r = torch.Generator().manual_seed(0); images = torch.rand(5,3,24,24, generator=r); _,masks,boxes,names = some(); groups = list('aabbc')
    found = baseline_maps(images, masks, 6, groups)
    assert all(v.shape==(5,6,6) and torch.isfinite(v).all() and (v>=0).all() for v in found.values())
    assert torch.equal(found['uniform'], uniform_maps(5, 6)) and torch.equal(found['random'], random_maps(5, 6)) and torch.equal(found['boxes'], mask_maps(masks, 6))
    close(found['prior'], regrid(loo_prior(masks, groups, 0), 6), 1e-7); assert torch.equal(found['prior'], prior_maps(masks, 6, groups))
    other = masks.clone(); other[0] = ~other[0] # an image says nothing about itself or its church
    assert torch.equal(center_widths(other, groups)[:2], center_widths(masks, groups)[:2]) and not torch.equal(center_maps(other, 6, groups)[2], center_maps(masks, 6, groups)[2])
    close(found['center'], found['center'].flip(-1), 1e-7); close(found['center'], found['center'].flip(-2), 1e-7)
    p = masks[4].double()/masks[4].sum(); c = (np.arange(24)+.5)/24-.5
    two = center_widths(masks[[0,4]])[0]; close(two, np.sqrt((p.numpy()*(c[:,None]**2+c**2)).sum()/2))

def test_edges_against_scipy():
    from scipy.ndimage import sobel
    x = torch.rand(2,3,12,12, generator=torch.Generator().manual_seed(3)).double(); gray = x.mean(1).numpy()
    want = np.stack([np.hypot(sobel(i, 0, mode='nearest'), sobel(i, 1, mode='nearest'))/8 for i in gray])
    close(edge_maps(x, 12), want, 1e-12); close(edge_maps(x, 4), want.reshape(2,4,3,4,3).sum((2,4)), 1e-12)

@many
@given(st.lists(st.integers(0,6), min_size=2, max_size=30), st.integers(0,9))
def test_derangement(groups, seed):
    if 2*max(map(groups.count, groups))>len(groups):
        with pytest.raises(ValueError, match='more than half'): derangement(len(groups), groups, seed)
        return
    try: p = derangement(len(groups), groups, seed)
    except RuntimeError: return # very many of one church
    assert sorted(p)==list(range(len(groups))) and all(groups[i]!=groups[j] for i,j in enumerate(p)) and p==derangement(len(groups), groups, seed)

def test_derangements_are_equally_likely():
    seen = [tuple(derangement(4, seed=s)) for s in range(1800)]
    counts = np.array([seen.count(p) for p in set(seen)]); assert len(counts)==9 and counts.min()>140 and counts.max()<260
    x = torch.arange(8.); assert (other_maps(x)!=x).all()

# ---- refusals

h,m,full = torch.rand(4,4, generator=torch.Generator().manual_seed(1)),torch.zeros(4,4, dtype=torch.bool).index_fill(0, T(1), True),torch.ones(4,4, dtype=torch.bool)
t = m.double()/m.sum()
@pytest.mark.parametrize('call,match', [
    (lambda: rank_accuracy(h[:3], m), 'upsample'), (lambda: average_precision(h, m&False), 'empty'), (lambda: nss(h, m.float()), 'bool'), (lambda: nss(h*float('nan'), m), 'finite'),
    (lambda: mass_iou(h-1, m), 'negative'), (lambda: mass_iou(h*0, m), 'zero'), (lambda: n_holding(h, 0), 'share'), (lambda: n_holding(h, 1.1), 'share'), (lambda: pointing_game(h, m, -1), 'distance'),
    (lambda: kl_divergence(h, t, 1), 'eps'), (lambda: kl_divergence(h, t*2), 'distribution'), (lambda: similarity(h, torch.ones(2,2)/4), 'soft_target'), (lambda: emd(h*float('inf'), t), 'finite'),
    (lambda: correlation(h, full/16.), 'same everywhere'), (lambda: soft_target(m&False, 2), 'empty'), (lambda: soft_target(h, 2), 'bool'), (lambda: shuffled_auroc(h, m, h[:2]), 'one frame'),
    (lambda: shuffled_auroc(h, m, h*0), 'loo_prior'), (lambda: information_gain(h, m, h*0), 'loo_prior'), (lambda: loo_prior(m[None]), 'one church'), (lambda: loo_prior(m), 'groups'),
    (lambda: loo_prior(torch.stack([m,m&False])), 'empty'), (lambda: box_masks(torch.zeros(0,4), 4), 'no boxes'), (lambda: box_scores(h, m[None], 'area'), 'recall'),
    (lambda: edge_maps(h[None], 2), 'expected'), (lambda: derangement(2, [1]), 'groups'), (lambda: derangement(1), 'more than half'),
    (lambda: find_places(rank_pixels(h), m[:2]), 'expected 16 pixels'), (lambda: shares(h-1), 'negative'), (lambda: rank_accuracy(h, m[None]), 'one mask')])
def test_bad_input(call, match):
    with pytest.raises(ValueError, match=match): call()
