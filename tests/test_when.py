"Looks at a training: they change nothing, the last one is the result, and a break loses none."
import json
from dataclasses import asdict, replace
from functools import cache
import numpy as np, pandas as pd, pytest, torch
from small import SIDE, load_backbone
from ssl_wikichurches.finetune import training
from ssl_wikichurches.finetune.linear import LinearRecipe
from ssl_wikichurches.finetune.tiers import TIERS
from ssl_wikichurches.finetune.training import make_recipe, moments
from ssl_wikichurches.study.folders import check_recipe
from ssl_wikichurches.study.plan import Study, as_study, load_study, study_runs, tier_recipe
from ssl_wikichurches.study.runs import _Watch, evaluate_maps
from ssl_wikichurches.study.when import half_way, training_curves

HARD = dict(lora={}, full=dict(drop_path=.2), block_expansion={}) # chance in training, adapters that are merged, blocks that are added
def same(a, b): return a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())

@pytest.fixture(scope='module')
def forty(data):
    "At most ten training photographs of each style: three batches of 14."
    y = data.labels[list(data.split.train)]
    return replace(data, split=replace(data.split, train=tuple(y.groupby(y).head(10).index), val=data.split.val[::3]))

@pytest.fixture(scope='module')
def fitted(forty):
    "Three steps an epoch, two epochs."
    def fit(tier, measure='', folder=None, epochs=2, **how):
        recipe = make_recipe(TIERS[tier].recipe, epochs=epochs, lr=1e-3, batch=14, measure=measure, **HARD[tier], **how)
        return TIERS[tier].fit(load_backbone('tiny-clip'), replace(forty, watch=_Watch(forty, 'cpu')), recipe, 5, 'cpu', folder)
    return cache(fit)

@pytest.mark.parametrize('tier', HARD)
def test_a_look_changes_nothing_and_the_last_one_is_the_result(tier, fitted, forty):
    plain,seen = fitted(tier),fitted(tier, '2,3,4')
    assert same(plain.state, seen.state) and plain.moments==()
    drop = lambda h: h.drop(columns='images_per_second')
    pd.testing.assert_frame_equal(drop(plain.history), drop(seen.history), check_exact=True)
    assert [row['step'] for row,_ in seen.moments]==[0,2,3,4,6]
    for network,at in ((seen.backbone,-1), (load_backbone('tiny-clip'),0)): # at the end, and before the first step
        stored,_ = evaluate_maps(network, forty)
        assert torch.equal(seen.moments[at][1], stored.maps[:,-1].float().mean(1))
    rows = {row['step']:row for row,_ in seen.moments}
    for epoch in (1,2): assert rows[3*epoch]['val_loss']==seen.history.val_loss[epoch] and rows[3*epoch]['train_loss']==seen.history.train_loss[epoch]

@pytest.mark.parametrize('measure,epochs,at', [('2,3,4',2,5), ('every_epoch',3,6)]) # after a look within an epoch; after the second epoch
def test_a_break_loses_no_look(fitted, tmp_path, monkeypatch, measure, epochs, at):
    whole,real,count = fitted('lora', measure, epochs=epochs),training._gradients,[0]
    class Killed(Exception): pass
    def step(*args):
        if count[0]==at: raise Killed
        count[0] += 1
        return real(*args)
    with monkeypatch.context() as m:
        m.setattr(training, '_gradients', step)
        with pytest.raises(Killed): fitted('lora', measure, tmp_path, epochs)
    again = fitted('lora', measure, tmp_path, epochs)
    drop = lambda moments: [{k:v for k,v in row.items() if k!='seconds' and v==v} for row,_ in moments]
    assert drop(again.moments)==drop(whole.moments) and all(torch.equal(a, b) for (_,a),(_,b) in zip(again.moments, whole.moments)) and same(again.state, whole.state)
    pd.testing.assert_frame_equal(*(f.history.drop(columns='images_per_second') for f in (again,whole)), check_exact=True)

def test_the_chosen_epoch_is_looked_at(fitted, forty):
    best = fitted('full', '1', select='best')
    assert {0,1,3*best.best_epoch,6}=={row['step'] for row,_ in best.moments}
    at = next(maps for row,maps in best.moments if row['step']==3*best.best_epoch)
    assert torch.equal(at, evaluate_maps(best.backbone, forty)[0].maps[:,-1].float().mean(1))

def test_what_is_asked_for_is_part_of_a_run(tmp_path):
    old,new = Study(tiers=('linear','full','lora','random_labels')),Study(tiers=('linear','full','lora','random_labels'), measure='log')
    assert [tier_recipe(new, t).measure for t in new.tiers]==['','log','log','log']
    assert tier_recipe(replace(new, recipes=dict(lora=dict(measure='1,5'))), 'lora').measure=='1,5'
    (tmp_path/'s.toml').write_text('measure = "every_epoch"'); assert load_study(tmp_path/'s.toml').measure=='every_epoch'
    run = next(r for r in study_runs(old, 'k') if r.tier=='lora')
    before = asdict(run); del before['recipe']['measure'] # of a version that could not look
    (folder := tmp_path/run.name).mkdir(); (folder/'recipe.json').write_text(json.dumps(before)); (folder/'run.json').write_text('{}')
    assert check_recipe(folder, run)
    with pytest.raises(ValueError, match='another recipe'): check_recipe(folder, next(r for r in study_runs(new, 'k') if r.tier=='lora'))
    for wrong in ('sometimes','0,5','1;5'):
        with pytest.raises(ValueError, match='every_epoch'): as_study(dict(measure=wrong), 'x')
    with pytest.raises(ValueError, match='frozen backbone'): LinearRecipe(measure='log')
    with pytest.raises(ValueError, match='has 6'): moments('7', 3, 2)
    assert moments('log', 1, 1)==[1] and moments('every_epoch', 3, 2)==[3,6]

class Folds:
    "A study of one crossfitted tier: every fold is looked at on all images, and may be read on its own."
    runs = pd.DataFrame([dict(name=f's{s}f{f}', model='m', tier='attn_supervised', seed=s, seconds=1., n_val=50, held_out=[f'Q{i}_a' for i in range(8) if i%2==f]) for s in (0,1) for f in (0,1)])
    def of_kind(self, kind): return self.runs
    def has(self, run, file): return True
    def groups(self, names): return [n[:2] for n in names]
    def moments(self, run): return pd.DataFrame(dict(epoch=[0.,1.], train_loss=1., val_loss=1., val_accuracy=.5, val_balanced_accuracy=[.25,.5+.1*int(run[1])], seconds=1.), index=pd.Index([0,3], name='step'))
    def moment_scores(self, run, metric): return pd.DataFrame({0:0., 3:[1. if (i%2)==int(run[3]) else 100. for i in range(8)]}, index=pd.Index([f'Q{i}_a' for i in range(8)], name='image'))

def test_tiers_that_use_boxes_are_read_out_of_fold():
    curves = training_curves(Folds())['m','attn_supervised']
    assert curves.shift.shape==(8,2,2) and (curves.shift[...,1]==1).all() # 100 is what images score whose boxes were used
    np.testing.assert_allclose(curves.accuracy, [[.25,.5],[.25,.6]])

def test_half_way_by_hand():
    assert half_way(np.array([0,1,2.]), np.array([0,-1,-2.]))[1]==-1
    assert half_way(np.array([0,2,4.]), np.array([0,4,4.]))==(1.0,0)
