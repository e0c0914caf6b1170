"One training in two processes gives what it gives in one."
import json, os, processes
import torch, pandas as pd, pytest
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from torch.utils.data import DataLoader, TensorDataset
from small import SIDE, load_backbone
from ssl_wikichurches.study import runs as runs_module
from ssl_wikichurches.finetune import training as finetune
from ssl_wikichurches.finetune.devices import BatchShares, Team, launch
from ssl_wikichurches.study.plan import Study
from ssl_wikichurches.study.runs import gpu_groups, run_study
from ssl_wikichurches.attention.maps import load_maps
from ssl_wikichurches.finetune.full import FullRecipe, fit_full
from ssl_wikichurches.finetune.lora import LoraRecipe, fit_lora

RECIPES = dict(full=FullRecipe(epochs=2, batch=8, accumulate=2, clip=1.), lora=LoraRecipe(epochs=1, batch=14, lr=1e-3, dropout=0.)) # four steps an epoch, and two
FITS = dict(full=fit_full, lora=fit_lora)

def numbers(history): return history.drop(columns='images_per_second')

def trained(data, tiers, folder=None, stop=None):
    "Fits of a clip toy, one tier after the other; killed in the given step of all."
    if stop is not None:
        real,steps = finetune._gradients,iter(range(10**6))
        def backward(*args):
            if next(steps)==stop: raise RuntimeError("out of power")
            return real(*args)
        finetune._gradients = backward
    fits = [FITS[t](load_backbone('tiny-clip'), data, RECIPES[t], 0, 'cpu', folder) for t in tiers]
    return [(f.history, f.state, Team().n) for f in fits]

def trained_killed_resumed(data, left, folder):
    "As `trained`; then the first tier again, which loses its power in the sixth step, and goes on. A checkpoint stays in `left`."
    fits,real = trained(data, ['full','lora']),finetune._gradients
    for f in (left,folder):
        with pytest.raises(RuntimeError, match='out of power'): trained(data, ['full'], f, 5)
        finetune._gradients = real
    return fits+trained(data, ['full'], folder)

@pytest.fixture(scope='module')
def stopped(tmp_path_factory): return tmp_path_factory.mktemp('stopped')

@pytest.fixture(scope='module')
def pair(two_dozen, stopped, tmp_path_factory):
    return launch(2, trained_killed_resumed, two_dozen, stopped, tmp_path_factory.mktemp('resumed')),trained(two_dozen, ['full','lora'])

@pytest.mark.parametrize('i', [0,1])
def test_two_processes_train_as_one(pair, i):
    (shared,weights,n),(alone,own,one) = (p[i] for p in pair)
    assert (n,one)==(2,1)
    pd.testing.assert_frame_equal(numbers(shared), numbers(alone), rtol=2e-4, atol=1e-6)
    start = load_backbone('tiny-clip').state_dict()
    assert weights.keys()==own.keys()
    moved = [(own[k]-start.get(k.removeprefix('backbone.'), torch.zeros(()))).abs().max() for k in own]
    gaps = [(weights[k]-own[k]).abs().max() for k in own]
    assert max(gaps)<.02*max(moved) and max(moved)>1e-5

def test_two_processes_resume_to_the_same_bits(two_dozen, stopped, pair):
    assert (stopped/'checkpoint.safetensors').is_file()
    with pytest.raises(ValueError, match='another training'): trained(two_dozen, ['full'], stopped) # of one process
    whole,_,(history,weights,_) = pair[0]
    assert all(torch.equal(v, whole[1][k]) for k,v in weights.items())
    pd.testing.assert_frame_equal(numbers(history), numbers(whole[0]), check_exact=True)

@pytest.mark.parametrize('n', [1,2,3,7])
def test_shares_are_a_partition(n):
    batches = [list(range(10)), list(range(10,13))]
    for b in range(2):
        assert sorted(i for r in range(n) for s in BatchShares([batches[b]], r, n) for i in s)==batches[b]
    sizes = [len(s) for r in range(n) for s in BatchShares([batches[0]], r, n)]
    assert max(sizes)-min(sizes)<=1

def team(n, rank=0):
    t = Team(); t.n,t.rank = n,rank
    return t

def test_batches_that_are_too_small_for_a_team():
    loader = DataLoader(TensorDataset(torch.arange(9)), 4) # 4, 4, 1
    with pytest.raises(ValueError, match='too few for 2 processes'): team(2).share(loader)
    assert [len(x) for x, in team(2, 1).share(loader, every=False)]==[2,2]
    with pytest.raises(ValueError, match='too few for 5'): team(5).share(loader, every=False)

def test_what_goes_wrong_in_a_team_is_told():
    with pytest.raises(Exception, match='no such thing'): launch(2, processes.broken)

def test_augmentation_follows_from_seeds_alone(data):
    "Two decoding processes, a share of each batch, and the loader alone draw the same pixels."
    loader = lambda workers: replace(data, workers=workers).loader('train', 8, augment=True, shuffle=True, seed=3)
    torch.manual_seed(1); before = torch.get_rng_state()
    (x,t),(y,u) = ([torch.cat(p) for p in zip(*loader(w))] for w in (0,2))
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(x, y) and torch.equal(t, u)
    half = [b for b,_ in team(2, 1).share(loader(0), every=False)]
    assert torch.equal(half[0], x[:8][1::2])
    again = loader(0); first = torch.cat([b for b,_ in again]); second = torch.cat([b for b,_ in again])
    assert torch.equal(first, x) and not torch.equal(second, x) # every epoch draws anew

@pytest.mark.parametrize('visible,size,groups', [(None,1,['0','1','2']), (None,2,['0,1']), ('5,7,2',1,['5','7','2']), ('5,7,2',3,['5,7,2'])])
def test_groups_of_gpus(visible, size, groups, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 3)
    if visible: monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
    else: monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    assert gpu_groups(size)==groups
    with pytest.raises(ValueError, match='4 processes on 3 GPUs'): gpu_groups(4)

def test_every_worker_has_its_own_gpus(monkeypatch):
    taken,places = get_context('spawn').Value('i', 0),[]
    monkeypatch.setattr(torch, 'set_num_threads', lambda n: None)
    for _ in range(3):
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
        runs_module._take_place(1, ['0,1','2,3','4,5'], taken)
        places.append(os.environ['CUDA_VISIBLE_DEVICES'])
    assert places==['0,1','2,3','4,5']

def test_a_study_whose_trainings_are_shared(drawn, few_questions, tmp_path):
    study = Study('s', str(drawn), ('tiny-clip',), ('full',), size=64, val=.3, recipes=dict(full=dict(epochs=2, batch=10, backbone_lr=1e-4)))
    with ThreadPoolExecutor(1) as pool: roots = [run_study(study, tmp_path/str(n), pool, device='cpu', processes=n, progress=False) for n in (1,2)]
    facts = [json.loads((r/'tiny-clip-full-seed0/run.json').read_text()) for r in roots]
    assert [f['processes'] for f in facts]==[1,2] and facts[0]['scores']==facts[1]['scores']
    a,b = (load_maps(r/'tiny-clip-full-seed0').maps for r in roots)
    frozen = load_maps(roots[0]/'tiny-clip-frozen').maps
    assert (a-b).abs().max()<.05*(a-frozen).abs().max() and (a-frozen).abs().max()>0
