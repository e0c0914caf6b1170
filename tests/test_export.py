"Exported models in other programs, on a stand-in of the hub, and as a data package."
import json, os, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest, torch
from hub_server import HubServer
from safetensors.torch import load_file
from ssl_wikichurches.backbones.encoders import load_backbone
from ssl_wikichurches.finetune.lora import LoraRecipe, add_adapters, merge_adapters
from ssl_wikichurches.finetune.training import load_classifier
from ssl_wikichurches.study.export import base_of, export_run, peft_adapters
from ssl_wikichurches.study.plan import Study
from ssl_wikichurches.study.reader import open_study
from ssl_wikichurches.study.runs import run_study
from ssl_wikichurches.study.tables import study_table

MODELS = 'tiny-clip','tiny-supervised' # one of each library

@pytest.fixture(scope='module')
def opened(drawn, tmp_path_factory):
    study = Study('small', data=str(drawn), models=MODELS, size=64, val=.3, recipes=dict(linear=dict(epochs=2), lora=dict(epochs=1, lr=1e-2), full=dict(epochs=1, backbone_lr=1e-3)))
    with ThreadPoolExecutor(1) as pool: return open_study(run_study(study, tmp_path_factory.mktemp('runs'), pool, device='cpu', progress=False))

@pytest.fixture(scope='module')
def exported(opened, tmp_path_factory):
    out,table = tmp_path_factory.mktemp('export'),study_table(opened)
    return {f'{m}-{t}-seed0':export_run(opened, f'{m}-{t}-seed0', out, table) for m in MODELS for t in ('linear','lora','full')}

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))

ELSEWHERE = """
import json, sys, torch, timm
from peft import PeftModel
from transformers import AutoModel
folders,x = json.loads(sys.argv[1]),torch.load(sys.argv[2])
clip = lambda m: m(pixel_values=(x-torch.tensor([.48145466,.4578275,.40821073]).view(3,1,1))/torch.tensor([.26862954,.26130258,.27577711]).view(3,1,1), interpolate_pos_encoding=True).pooler_output
vit = lambda m: m((x-.5)/.5)
opened = dict(clip_lora=(clip, PeftModel.from_pretrained(AutoModel.from_pretrained(folders[0]+'/base'), folders[0])), clip_full=(clip, AutoModel.from_pretrained(folders[1])),
              vit_lora=(vit, PeftModel.from_pretrained(timm.create_model('local-dir:'+folders[2]+'/base', pretrained=True, num_classes=0), folders[2])),
              vit_full=(vit, timm.create_model('local-dir:'+folders[3], pretrained=True, num_classes=0)))
with torch.no_grad(): torch.save({k:f(m.eval()) for k,(f,m) in opened.items()}, sys.argv[3])
assert not [m for m in sys.modules if m.startswith('ssl_wikichurches')]
"""

def test_other_programs_see_the_same_features(opened, exported, tmp_path):
    "transformers, timm and peft, in a process that does not know this package: within 1e-6 of the largest number."
    names = [f'{m}-{t}-seed0' for m in MODELS for t in ('lora','full')]
    torch.save(IMAGES, tmp_path/'x')
    done = subprocess.run([sys.executable, '-c', ELSEWHERE, json.dumps([str(exported[n]) for n in names]), str(tmp_path/'x'), str(tmp_path/'y')], capture_output=True, text=True)
    assert done.returncode==0, done.stderr
    found = torch.load(tmp_path/'y')
    for name,feature in zip(names, found.values()):
        with torch.no_grad(): own = opened.model(name)[0](IMAGES)
        assert (feature-own).abs().max()<=1e-6*max(1, own.abs().max()), name

def test_no_card_says_where_the_photographs_lie(drawn, exported):
    cards = [p.read_text() for folder in exported.values() for p in folder.rglob('*') if p.suffix in ('.md','.json')]
    assert not any(str(drawn.parent) in c for c in cards) and sum(f'photographs of `{drawn.name}`' in c for c in cards)==len(exported)

def test_names_are_those_of_the_plan(exported):
    root = exported['tiny-clip-full-seed0'].parents[1]
    files = {str(p.relative_to(root)) for p in root.rglob('*') if p.is_file()}
    assert {'linear_probe/tiny-clip_linear.safetensors','lora/tiny-clip_lora_r8/adapter_config.json','lora/tiny-clip_lora_r8/adapter_model.safetensors',
            'full_ft/tiny-clip_full.safetensors','full_ft/tiny-clip_full/config.json'}<=files
    assert all((folder/'README.md').is_file() for folder in exported.values())

def test_a_card_and_a_classifier_say_what_the_run_says(opened, exported):
    facts = opened.runs.set_index('name').loc['tiny-clip-full-seed0']
    card = (exported['tiny-clip-full-seed0']/'README.md').read_text()
    row = study_table(opened).query("model=='tiny-clip' and tier=='full'").iloc[0]
    for part in ('license: apache-2.0', 'library_name: transformers', f"{row['shift']:+.4f}", f'{row.low:+.4f} to {row.high:+.4f}', f"{facts.scores['eval']['accuracy']:.3f} of", facts.data_key,
                 *facts.classes): assert part in card, part
    state = load_file(exported['tiny-clip-full-seed0']/'classifier.safetensors')
    assert torch.equal(load_classifier(state).weight, opened.model('tiny-clip-full-seed0')[1].weight)

@pytest.mark.parametrize('how', [dict(targets='qkv'), dict(targets='v', rslora=True), dict(rank=3, alpha=5.)])
def test_fused_adapters_are_those_of_their_parts(how, tmp_path):
    "Of a map for queries, keys and values in one; with matrices B that are not zero."
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
    from ssl_wikichurches.data.files import write_json, write_tensors
    recipe,one = LoraRecipe(**how),load_backbone('tiny-supervised')
    add_adapters(one, recipe)
    state = {k:torch.randn(v.shape, generator=torch.Generator().manual_seed(1))*.1 for k,v in get_peft_model_state_dict(one.model).items()}
    set_peft_model_state_dict(one.model, state)
    merge_adapters(one)
    fields,tensors = peft_adapters(two := load_backbone('tiny-supervised'), recipe, {f'adapter.{k}':v for k,v in state.items()})
    write_tensors(tmp_path/'adapter_model.safetensors', tensors); write_json(tmp_path/'adapter_config.json', dict(fields, peft_type='LORA'))
    two.model = PeftModel.from_pretrained(two.model, str(tmp_path))
    x = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(2))
    with torch.no_grad(): assert torch.allclose(two.eval()(x), one(x), atol=1e-5) and not torch.allclose(one(x), load_backbone('tiny-supervised')(x), atol=1e-2)

def test_what_peft_cannot_be_told_is_refused():
    with pytest.raises(ValueError, match='DoRA on the fused map'): peft_adapters(load_backbone('tiny-supervised'), LoraRecipe(dora=True), {})

def test_bases(tmp_path):
    assert base_of('dinov2')==('facebook/dinov2-with-registers-base','apache-2.0') and base_of('tiny-mae')==('','apache-2.0')
    assert base_of('someone/else')==('someone/else','') and base_of(str(tmp_path))==('','') and base_of('hub:someone/else')[0]=='someone/else'

PUBLISH = """
import json, sys, torch
from ssl_wikichurches.backbones.encoders import load_backbone
from ssl_wikichurches.study.export import publish
from ssl_wikichurches.study.folders import weights_mark
folders,x = json.loads(sys.argv[1]),torch.load(sys.argv[2])
for i,f in enumerate(folders): print(publish(f, f'me/model-{i}'))
found = [load_backbone(f'hub:me/model-{i}') for i in range(len(folders))]
assert all(weights_mark(f'hub:me/model-{i}').startswith('hub:') for i in range(len(folders)))
with torch.no_grad(): torch.save([(b.spec.name, b.spec.size, b(x)) for b in found], sys.argv[3])
"""

def test_published_and_loaded(opened, exported, tmp_path):
    "Adapters and whole models, of both libraries, against a stand-in of the hub."
    names = [f'{m}-{t}-seed0' for m in MODELS for t in ('lora','full')]
    torch.save(IMAGES, tmp_path/'x')
    with HubServer() as hub:
        env = os.environ|dict(HF_ENDPOINT=hub.base, HF_HOME=str(tmp_path/'home'), HF_TOKEN='secret', HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_PROGRESS_BARS='1', HF_HUB_OFFLINE='0')
        done = subprocess.run([sys.executable, '-c', PUBLISH, json.dumps([str(exported[n]) for n in names]), str(tmp_path/'x'), str(tmp_path/'y')], env=env, capture_output=True, text=True)
        assert done.returncode==0, done.stderr+str(hub.log[-5:])
        assert all(f'{hub.base}/me/model-{i}/commit/' in done.stdout for i in range(4)) and b'license: apache-2.0' in hub.repos['me/model-0']['README.md']
    for i,(name,(called,size,feature)) in enumerate(zip(names, torch.load(tmp_path/'y'))):
        with torch.no_grad(): own = opened.model(name)[0](IMAGES)
        assert (called,size)==(f'model-{i}',64) and (feature-own).abs().max()<=1e-6*max(1, own.abs().max())
