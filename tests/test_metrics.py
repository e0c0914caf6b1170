"Metrics against independent oracles: brute force, scikit-learn, scipy."
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy.stats import hypergeom
from sklearn.metrics import roc_auc_score
from ssl_wikichurches.attention.metrics import auroc, coverage, find_places, iou_at_percentile, iou_ceiling, iou_chance, n_kept, rank_pixels, shares, upsample

def brute_iou(heat, mask, q):
    k = round(heat.size*(100-q)/100)
    kept = sorted(range(heat.size), key=lambda i: (-heat.flat[i], i))[:k]
    top = np.zeros(heat.size, bool); top[kept] = True; m = mask.ravel()
    return (top&m).sum()/(top|m).sum()

@settings(max_examples=80, deadline=None)
@given(st.integers(2,9), st.integers(2,9), st.integers(0,10**6), st.sampled_from([0,10,50,75,90]), st.booleans())
def test_iou_coverage_and_auroc_against_oracles(h, w, seed, q, ties):
    g = np.random.default_rng(seed); n = h*w
    heat = (g.integers(0,4,(h,w)) if ties else g.random((h,w))).astype(np.float32)+np.float32(.01)
    mask = np.zeros(n, bool); mask[g.choice(n, g.integers(1,n), replace=False)] = True; mask = mask.reshape(h,w)
    t,m = torch.tensor(heat), torch.tensor(mask)
    if round(n*(100-q)/100)>=1:
        assert iou_at_percentile(t, m, q).item()==pytest.approx(brute_iou(heat, mask, q), abs=1e-6)
        assert iou_at_percentile(t, m, q).item()<=iou_ceiling(int(mask.sum()), n, q)+1e-6
    assert auroc(t, m).item()==pytest.approx(roc_auc_score(mask.ravel(), heat.ravel()), abs=1e-6)
    assert coverage(t, m).item()==pytest.approx(heat[mask].sum()/heat.sum(), abs=1e-5)

@settings(max_examples=60, deadline=None)
@given(st.integers(1,400), st.integers(0,400), st.sampled_from([0,25,50,90,95]))
def test_chance_is_the_hypergeometric_expectation(area, more, q):
    n = area+more
    if round(n*(100-q)/100)<1: return
    k = n_kept(n, q); x = np.arange(0, min(k,area)+1)
    assert iou_chance(area, n, q)==pytest.approx((hypergeom(n, area, k).pmf(x)*x/(k+area-x)).sum(), abs=1e-9)

def test_chance_at_photograph_size(): assert iou_chance(900, 224*224, 90)==pytest.approx((hypergeom(224*224, 900, n_kept(224*224)).pmf(np.arange(901))*np.arange(901)/(n_kept(224*224)+900-np.arange(901))).sum(), abs=1e-9)

def test_random_maps_score_at_chance():
    g = torch.Generator().manual_seed(0); mask = torch.zeros(10,10, dtype=torch.bool); mask[2:5,3:8] = True
    v = iou_at_percentile(torch.rand(4000,10,10, generator=g), mask, 80)
    assert v.mean().item()==pytest.approx(iou_chance(15, 100, 80), abs=4*v.std().item()/4000**.5)

@pytest.mark.parametrize('change', [lambda x: x*3, lambda x: x+1, lambda x: x**3, torch.exp])
def test_only_the_ranking_counts(change):
    g = torch.Generator().manual_seed(1); heat = torch.rand(5,12,12, generator=g).double(); mask = torch.rand(12,12, generator=g)>.7
    assert torch.equal(iou_at_percentile(heat, mask), iou_at_percentile(change(heat), mask)) and torch.equal(auroc(heat, mask), auroc(change(heat), mask))

def test_upsampling_a_centered_patch_keeps_its_center():
    m = torch.zeros(5,5); m[1,3] = 1; up = upsample(m, 50)
    y,x = divmod(up.argmax().item(), 50); assert (x//10,y//10)==(3,1)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize('values', [2, 5, 1000, 0])
def test_ranking_by_brute_force(dtype, values):
    "Negative numbers, both zeros, subnormals and ties, on the fast way and on the other."
    g = torch.Generator().manual_seed(values)
    x = torch.randint(-values, values+1, (3,2,7,9), generator=g)*.5 if values else torch.randn(3,2,7,9, generator=g)*10**torch.randn(3,2,7,9, generator=g).mul(12)
    x = (x*2 if dtype==torch.int64 else x).clamp(-1e4, 1e4).to(dtype); x.flatten()[:4] = torch.tensor([0.,-0.,1e-42,-1e-42]).to(dtype)
    r = rank_pixels(x); flat = x.flatten(-2)
    for i in np.ndindex(3,2):
        v = flat[i].tolist(); want = sorted(range(63), key=lambda j: (-v[j], j))
        assert r.order[i].tolist()==want and r.values[i].tolist()==[v[j] for j in want]
    mask = torch.rand(7,9, generator=g)>.6; p = find_places(r, mask)
    for i in np.ndindex(3,2):
        order,v = r.order[i].tolist(),r.values[i].tolist(); hit = [k for k,j in enumerate(order) if mask.flatten()[j]]
        assert p.at[i].tolist()==hit
        assert p.first[i].tolist()==[min(k for k in range(63) if v[k]==v[h]) for h in hit]
        last = [max(k for k in range(63) if v[k]==v[h]) for h in hit]
        assert p.last[i].tolist()==last and p.upto[i].tolist()==[sum(h<=l for h in hit) for l in last]

def test_ranking_keeps_gradients_and_maps_as_they_are():
    x = torch.randn(5,5, requires_grad=True); before = x.detach().clone(); rank_pixels(x)
    assert torch.equal(x, before) and shares(x.abs()).requires_grad

@pytest.mark.parametrize('call,match', [
    (lambda h,m: iou_at_percentile(h[:3], m), 'upsample'), (lambda h,m: iou_at_percentile(h, m.float()), 'bool'), (lambda h,m: iou_at_percentile(h, m&False), 'empty'),
    (lambda h,m: iou_at_percentile(h*float('nan'), m), 'finite'), (lambda h,m: iou_at_percentile(h, m, 100), 'percentile'), (lambda h,m: iou_at_percentile(h, m, 99.9), 'none'),
    (lambda h,m: coverage(h-1, m), 'negative'), (lambda h,m: coverage(h*0, m), 'zero'), (lambda h,m: auroc(h, m|True), 'outside'),
    (lambda h,m: auroc(h[None], m[None]), 'one mask'), (lambda h,m: iou_at_percentile(h-float('inf'), m), 'finite'), (lambda h,m: shares(h-h.max()), 'negative')])
def test_bad_input(call, match):
    h,m = torch.rand(4,4), torch.zeros(4,4, dtype=torch.bool); m[1,1] = True
    with pytest.raises(ValueError, match=match): call(h, m)
