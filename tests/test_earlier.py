"Files of an earlier study: what they hold comes over, and what they lack is said."
import json, os, sqlite3
from functools import cache
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from ssl_wikichurches.backbones.encoders import load_backbone
from ssl_wikichurches.cli import wikichurches_import
from ssl_wikichurches.data.churches import read_churches
from ssl_wikichurches.data.splits import load_split, make_split
from ssl_wikichurches.finetune.lora import LoraRecipe, add_adapters
from ssl_wikichurches.study.earlier import earlier_backbone, earlier_kind, earlier_table, read_earlier_scores, read_earlier_split, read_earlier_weights

IMAGES = [f'Q{k}_wd0.jpg' for k in range(12)]
RNG = np.random.default_rng(0); FROZEN = RNG.uniform(.05, .2, 12); TUNED = FROZEN+RNG.normal(.02, .01, 12)

def database(path, rows, columns='model, layer, method, image_id, percentile, iou, coverage'):
    with sqlite3.connect(path) as db:
        db.execute(f'create table image_metrics ({columns})')
        db.executemany(f"insert into image_metrics values ({','.join('?'*len(columns.split(',')))})", [r[:len(columns.split(','))] for r in rows])
    return path
def row(model, image, iou, layer='layer11', method='cls', q=90): return model, layer, method, image, q, iou, .1
def rows(tuned='clip_finetuned_lora', **how): return [row('clip', i, f, **how) for i,f in zip(IMAGES, FROZEN)]+[row(tuned, i, f, **how) for i,f in zip(IMAGES, TUNED)]

def test_a_database_and_both_kinds_of_json_agree(tmp_path):
    database(tmp_path/'m.db', [*rows(layer='layer2'), *rows(), *rows(q=50)])
    (tmp_path/'pairs.json').write_text(json.dumps(dict(models=dict(clip=dict(lora={'90':dict(per_image=[dict(image_id=i, frozen_iou=a, finetuned_iou=b) for i,a,b in zip(IMAGES, FROZEN, TUNED)])})))))
    (tmp_path/'rows.json').write_text(json.dumps(dict(rows=[dict(model_name='clip', strategy_id='lora', metric='iou', percentile=90, per_image_deltas=dict(zip(IMAGES, TUNED-FROZEN))),
                                                            dict(model_name='clip', strategy_id='lora', metric='kl', percentile=None, per_image_deltas=dict(zip(IMAGES, FROZEN-TUNED)))])))
    found = [read_earlier_scores(tmp_path/f) for f in ('m.db','pairs.json','rows.json')]
    assert [*map(earlier_kind, (tmp_path/'m.db', tmp_path/'rows.json'))]==['scores','scores'] and len(found[0])==24
    tables = [earlier_table(f) for f in found]
    for t in tables: assert (t.model.item(),t.tier.item(),t.n.item())==('clip','lora',12) and t['shift'].item()==pytest.approx((TUNED-FROZEN).mean())
    for c in ('low','high','p','d_z'): assert len({round(t[c].item(), 9) for t in tables})==1
    assert 'before' not in tables[2] and tables[0].before.item()==pytest.approx(FROZEN.mean())
    assert earlier_table(found[2], 'kl')['shift'].item()<0
    with pytest.raises(ValueError, match='only for iou@90, iou@50'): earlier_table(found[0], 'emd')

@pytest.mark.parametrize('made,words', [(lambda: rows()[:-1]+[row('clip_finetuned_lora','Q99_wd0.jpg',.1)], 'lacks the frozen score of clip for Q99_wd0.jpg'), (lambda: rows()[:12], 'no fine-tuned model'),
    (lambda: rows('clip_finetuned'), 'does not say by which strategy'), (lambda: [*rows(), row('clip','Q0_wd0.jpg',.1, method='rollout')], 'methods cls, rollout of clip'), (lambda: [*rows(), row('clip_finetuned_lora','Q0_wd0.jpg',.1)], 'two scores of Q0_wd0.jpg'),
    (lambda: [row('clip','x',.1), row('clip_finetuned_lora','x',.2)], "image name 'x'"), (lambda: [], 'no fine-tuned')])
def test_databases_that_lack_something(made, words, tmp_path):
    with pytest.raises(ValueError, match=words) as e: read_earlier_scores(database(tmp_path/'m.db', made()))
    assert 'm.db' in str(e.value)

def test_a_database_of_another_shape(tmp_path):
    database(tmp_path/'m.db', rows(), 'model, layer')
    with pytest.raises(ValueError, match='m.db has no table image_metrics with model.*iou'): read_earlier_scores(tmp_path/'m.db')
    (tmp_path/'n.db').write_bytes((tmp_path/'m.db').read_bytes()[:600])
    with pytest.raises(ValueError, match='n.db'): read_earlier_scores(tmp_path/'n.db')

@pytest.mark.parametrize('d,words', [({}, "'rows' with"), ([], "'rows' with"), (dict(rows=[]), 'no scores'), (dict(rows=[{}]), r"rows\[0\] lacks 'metric'"), (dict(rows=[dict(metric='iou', per_image_deltas={'Q1_wd0.jpg':'x'}, model_name='a', strategy_id='full')]), 'expected a number'),
    (dict(rows=[dict(metric='iou', per_image_deltas={'Q1_wd0.jpg':float('nan')}, model_name='a', strategy_id='full')]), 'finite'), (dict(rows=[dict(metric='iou', per_image_deltas={}, model_name='a', strategy_id='half')]), "'half' is none of"),
    (dict(models=dict(a=3)), 'expected dict'), (dict(models=dict(a=dict(full={'90':dict(per_image=[dict(image_id='Q1_wd0.jpg', frozen_iou=.1)])}))), "lacks 'finetuned_iou'")])
def test_json_that_lacks_something(d, words, tmp_path):
    (tmp_path/'s.json').write_text(json.dumps(d))
    with pytest.raises(ValueError, match=words) as e: read_earlier_scores(tmp_path/'s.json')
    assert 's.json' in str(e.value)

@cache
def tables(root): return read_churches(root, verify=False)

plain = st.recursive(st.none()|st.booleans()|st.floats()|st.text(max_size=4)|st.just('full'), lambda v: st.lists(v, max_size=3)|st.dictionaries(st.sampled_from(
    ['rows','models','a','full','90','per_image','image_id','frozen_iou','finetuned_iou','metric','per_image_deltas','model_name','strategy_id','percentile','Q1_wd0.jpg','train_image_ids','val_image_ids','annotated_eval_image_ids','seed']), v, max_size=5), max_leaves=12)

@settings(max_examples=60*int(os.environ.get('WIKICHURCHES_FUZZ', 1)), deadline=None)
@given(d=plain)
def test_json_with_anything_in_it(d, tmp_path_factory, drawn):
    p = tmp_path_factory.getbasetemp()/'any.json'; p.write_text(json.dumps(d))
    for read in (read_earlier_scores, lambda p: read_earlier_split(p, tables(drawn))):
        try: read(p)
        except ValueError as e: assert 'any.json' in str(e)

def test_a_split_that_trained_on_a_church_with_boxes(folder):
    churches = read_churches(folder); mine = make_split(churches, val=.3)
    said = dict(seed=42, train_image_ids=mine.train, val_image_ids=mine.val, annotated_eval_image_ids=mine.eval)
    (p := folder/'primary.json').write_text(json.dumps(said))
    assert read_earlier_split(p, churches).parts==mine.parts and earlier_kind(p)=='split'
    p.write_text(json.dumps(said|dict(annotated_eval_image_ids=mine.eval[1:], train_image_ids=[*mine.train, mine.eval[0]])))
    with pytest.raises(ValueError, match='primary.json: split leaks: 1 churches with boxes'): read_earlier_split(p, churches)
    p.write_text(json.dumps(said|dict(train_image_ids=[*mine.train, 'Q1_wd0.jpg'])))
    with pytest.raises(ValueError, match='primary.json: 1 images are not in'): read_earlier_split(p, churches)

def saved(path, model, head=True, **more):
    state = {f'backbone.{k}':v.clone() for k,v in model.state_dict().items()}
    if head: state |= {'classifier.head.1.weight':torch.ones(4,64), 'classifier.head.1.bias':torch.zeros(4)}
    torch.save(dict(model_state_dict=state, optimizer_state_dict=dict(state={}, param_groups=[dict(lr=1e-4)]), val_accuracy=.7, **more), path)
    return path

@pytest.mark.parametrize('name', ['tiny-dinov2','tiny-dinov3','tiny-mae','tiny-clip','tiny-siglip','tiny-siglip2'])
def test_weights_of_every_family(name, tmp_path):
    model = load_backbone(name).model
    with torch.no_grad():
        for p in model.parameters(): p += .01
    p = saved(tmp_path/f'{name}_full_finetuned.pt', model, config=dict(use_lora=False))
    found = read_earlier_weights(p)
    assert (found['model'],found['tier'])==(name,'full')
    backbone,classifier = earlier_backbone(p)
    assert all(torch.equal(v, backbone.model.state_dict()[k]) for k,v in model.state_dict().items()) and classifier.weight.eq(1).all()

@pytest.mark.parametrize('spoil,words', [(lambda p: p.write_bytes(p.read_bytes()[:-3000]), 'no file of torch.save, or is damaged'), (lambda p: p.write_bytes(b'PK\3\4x'), 'no file of torch.save'), (lambda p: torch.save([1], p), "lacks 'model_state_dict'"),
    (lambda p: torch.save(dict(model_state_dict={}), p), "lacks 'model_state_dict'"), (lambda p: torch.save({'a':torch.ones(1)}, p), r'lacks tensors named backbone\.'), (lambda p: saved(p, load_backbone('tiny-clip').model, head=False), 'lacks the classifier'),
    (lambda p: saved(p, load_backbone('tiny-mae').model), 'does not hold the weights of tiny-clip'), (lambda p: saved(p, load_backbone('tiny-clip').model, strategy_id='half'), "'half' is none of")])
def test_weights_that_lack_something(spoil, words, tmp_path):
    spoil(p := saved(tmp_path/'tiny-clip_full_finetuned.pt', load_backbone('tiny-clip').model))
    with pytest.raises(ValueError, match=words) as e: earlier_backbone(p)
    assert p.name in str(e.value)

def test_adapters_without_their_scale(tmp_path):
    backbone = load_backbone('tiny-clip'); add_adapters(backbone, LoraRecipe())
    with pytest.raises(ValueError, match="tiny-clip_lora_finetuned.pt: config lacks 'lora_alpha'"): earlier_backbone(saved(tmp_path/'tiny-clip_lora_finetuned.pt', backbone.model))

def test_the_command(tmp_path, monkeypatch, capsys, drawn):
    monkeypatch.chdir(tmp_path)
    database(tmp_path/'m.db', rows())
    wikichurches_import('m.db'); said = capsys.readouterr().out
    assert 'clip' in said and 'm-scores.csv (iou@90)' in said and len(pd.read_csv('m-scores.csv'))==12
    churches = read_churches(drawn); mine = make_split(churches, val=.3)
    Path('s.json').write_text(json.dumps(dict(train_image_ids=mine.train, val_image_ids=mine.val, annotated_eval_image_ids=mine.eval)))
    wikichurches_import('s.json', data=str(drawn)); assert load_split('s-split.json', churches).parts==mine.parts
    saved(tmp_path/'tiny-clip_full_finetuned.pt', load_backbone('tiny-clip').model)
    wikichurches_import('tiny-clip_full_finetuned.pt', out='mine'); assert load_backbone('mine').spec.name=='tiny-clip'
    with pytest.raises(SystemExit, match='wikichurches_import: there is no file'): wikichurches_import('nowhere.pt')
