"The doctor: a hub that answers, one that is gated, one that never answers, and machines that lack something."
import socket, subprocess, sys
import pytest
from hub_server import HubServer
from ssl_wikichurches.backbones.registry import PUBLISHED
from ssl_wikichurches.study.doctor import Finding, diagnose, find_photographs, find_space, find_time, find_weights, gpus, matrix_rate, within, works_text
from ssl_wikichurches.study.plan import Study

SOURCES = {m:PUBLISHED[m].source for m in Study().models}

@pytest.fixture
def alone(monkeypatch, tmp_path):
    "No cache, no token, no endpoint of this machine."
    for k in ('HF_ENDPOINT','HF_TOKEN','HF_HUB_OFFLINE','HF_HUB_CACHE','HF_TOKEN_PATH'): monkeypatch.delenv(k, raising=False)
    monkeypatch.setenv('HF_HOME', str(tmp_path/'hf')); monkeypatch.setenv('WIKICHURCHES_CACHE', str(tmp_path/'cache'))
    return tmp_path

def test_a_hub_with_a_gate(alone, monkeypatch):
    with HubServer() as hub:
        for repo in SOURCES.values(): hub.repos[repo] = {'config.json':b'{}'}
        del hub.repos[SOURCES['mae']]
        hub.gated.add(SOURCES['dinov3'])
        found = {f.what:f for f in find_weights(hub.base)}
        assert [found[m].found for m in ('dinov2','clip','siglip','siglip2')]==['on the hub']*4
        assert found['dinov3'].state=='note' and 'gated' in found['dinov3'].found and 'hf auth login' in found['dinov3'].advice and 'timm/vit_base_patch16_dinov3' in found['dinov3'].advice
        assert '404' in found['mae'].found
        monkeypatch.setenv('HF_TOKEN', 'wrong')
        assert 'not accepted' in {f.what:f for f in find_weights(hub.base)}['dinov3'].advice
        monkeypatch.setenv('HF_TOKEN', 'secret')
        assert {f.what:f for f in find_weights(hub.base)}['dinov3'].found=='on the hub'
        asked = len(hub.log)
        monkeypatch.setenv('HF_HUB_OFFLINE', '1')
        offline = find_weights(hub.base)
        assert len(hub.log)==asked and offline[0].found=='HF_HUB_OFFLINE is set' and offline[-1].what=='weights'

def test_a_hub_that_never_answers(alone):
    with socket.create_server(('127.0.0.1', 0)) as silent:
        found = find_weights(f'http://127.0.0.1:{silent.getsockname()[1]}', seconds=.1)
    assert [f.what for f in found]==['hub','weights'] and all(f.state=='note' for f in found)
    assert within(.05, lambda: socket.getaddrinfo('no.such.name.invalid', 80)) is None

def test_photographs_and_space(alone):
    assert find_photographs().state=='note'
    (images := alone/'cache'/'wikichurches'/'images').mkdir(parents=True)
    (images.parent/'churches.json').write_text('{}')
    for i in range(1000): (images/f'{i}.jpg').touch()
    assert find_photographs().state=='good' and find_photographs(str(images.parent)).found.startswith('1000 in')
    (images/'7.jpg').unlink()
    assert 'frozen baseline' in find_photographs().advice
    assert {f.state for f in find_space(alone/'not'/'yet', free=lambda f: 1e12)}=={'good'}

def test_slow_machines_are_told(alone):
    slow,fast = find_time([], 1e11),find_time([], 1e14)
    assert slow[-1].state=='note' and fast[-1].state=='good' and matrix_rate(64, 2)>0

class Library:
    "A stand-in for NVIDIA's management library, with two GPUs."
    def nvmlInit_v2(self): return 0
    def nvmlDeviceGetCount_v2(self, n): n._obj.value = 2
    def nvmlDeviceGetHandleByIndex_v2(self, i, handle): handle._obj.value = i+1
    def nvmlDeviceGetName(self, handle, name, n): name.value = b'Card %d' % handle.value
    def nvmlDeviceGetMemoryInfo(self, handle, memory): memory._obj[0] = 80_000_000_000
    def nvmlDeviceGetCudaComputeCapability(self, handle, major, minor): major._obj.value,minor._obj.value = 8,6

def test_gpus_of_the_driver(): assert gpus(Library())==[('Card 1', 80., 8.6), ('Card 2', 80., 8.6)]

def test_what_will_work(alone):
    found = [*diagnose(base='http://127.0.0.1:9', seconds=.1)]
    assert works_text(found).startswith('will work here: the demonstration')
    real = [Finding(m, 'on the hub') for m in SOURCES]+[Finding('photographs', 'there')]
    assert works_text(real).endswith('the study on real photographs')

def test_it_starts_without_torch():
    code = "import sys, ssl_wikichurches.study.doctor; print([m for m in ('torch','transformers','timm','scipy') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip()=='[]'
