"What several test files need: a small drawn folder, and the real photographs where the machine has them."
import os, shutil
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
import pytest
from filelock import FileLock

# The package is imported where it is needed: the rules of the house are checked without waiting for torch.

def made_once(factory, name, make):
    "A folder that the first process that needs it makes for all of a test run."
    home = factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ: home = home.parent
    with FileLock(home/f'{name}.lock'):
        if not (ready := home/f'{name}.ready').exists():
            make(home/name)
            ready.touch()
    return home/name

@pytest.fixture(scope='session')
def drawn(tmp_path_factory):
    "Sixty drawn photographs of 64 pixels, twelve of them annotated. Not to be changed."
    from ssl_wikichurches.data.synthetic import make_churches
    return made_once(tmp_path_factory, 'drawn', lambda folder: make_churches(folder, n=60, n_annotated=12, size=64, seed=1))

@pytest.fixture(scope='session')
def finished(drawn, tmp_path_factory):
    "The complete study of `brief`. Not to be changed."
    from brief import brief, here
    return made_once(tmp_path_factory, 'finished', lambda folder: here(brief(drawn), folder))/'brief'

@pytest.fixture(scope='module')
def few_questions():
    "What was forgotten is asked of 48 photographs, not 240: for files whose studies are about something else."
    from ssl_wikichurches.backbones import forgetting
    with pytest.MonkeyPatch.context() as m:
        m.setattr(forgetting, 'held_out_task', partial(forgetting.held_out_task, n=48))
        yield

@pytest.fixture
def folder(drawn, tmp_path):
    "A copy of `drawn` that a test may break."
    return Path(shutil.copytree(drawn, tmp_path/'set'))

@cache
def quarter():
    from ssl_wikichurches.data.download import load_churches
    from ssl_wikichurches.data.splits import make_split
    from ssl_wikichurches.finetune.training import TrainData
    churches = load_churches('synthetic'); split = make_split(churches)
    return TrainData(churches, replace(split, train=split.train[::4], val=split.val[::2], eval=split.eval[:12]), 96)

def sized(request): return replace(quarter(), size=getattr(request.module, 'SIDE', 96))

@pytest.fixture(scope='module')
def data(request):
    "A quarter of the default photographs to train on, of the size that a file names as `SIDE`."
    return sized(request)

@pytest.fixture(scope='module')
def two_dozen(request):
    "At most seven of these photographs of each style, for what is trained often; a file may take them for its `data`."
    data = sized(request); y = data.labels[list(data.split.train)]
    return replace(data, split=replace(data.split, train=tuple(y.groupby(y).head(7).index), val=data.split.val[::3]))

@pytest.fixture(scope='module')
def images(request): return next(iter(sized(request).loader('eval', 4)))[0]

@pytest.fixture(scope='session')
def real():
    "Folder with real photographs and real weights."
    root = os.environ.get('WIKICHURCHES_TEST_DATA')
    if not root: pytest.skip('WIKICHURCHES_TEST_DATA is not set: real photographs and weights are not tested')
    return Path(root)

@pytest.fixture(scope='session')
def browser():
    "Chromium without a window, where the machine has one."
    sync = pytest.importorskip('playwright.sync_api', reason='playwright is not installed: pages are not looked at')
    if not (path := os.environ.get('CHROMIUM') or next(filter(None, map(shutil.which, ('chromium','chromium-browser','google-chrome'))), None)): pytest.skip('no Chromium on this machine: pages are not looked at')
    with sync.sync_playwright() as p:
        found = p.chromium.launch(executable_path=path, args=['--no-sandbox'])
        yield found
        found.close()
