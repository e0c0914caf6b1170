"Commands: nothing is loaded before it is needed, and what goes wrong is said in a line that leads to the rest."
import ast, os, re, subprocess, sys
from pathlib import Path
import pytest
from ssl_wikichurches import cli
from ssl_wikichurches.study.plan import RunsFailed

ROOT = Path(__file__).parent.parent
COMMANDS = re.findall(r'(wikichurches_\w+)=', (ROOT/'settings.ini').read_text())
HEAVY = ('torch','timm','transformers','sklearn','scipy','statsmodels','pandas')
CUDA = 'CUDA error: an illegal memory access was encountered\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.'

def python(script, *args, cwd=None):
    done = subprocess.run([sys.executable, '-c', script, *map(str, args)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode==0, done.stderr
    return done.stdout.splitlines()

def test_commands_and_studies_are_known_without_the_large_packages():
    script = f"import sys\nimport ssl_wikichurches.cli, ssl_wikichurches.study.plan\nprint([m for m in {HEAVY} if m in sys.modules])"
    assert python(script)==['[]']

def test_wrong_arguments_are_refused_before_torch_is_loaded(tmp_path):
    "In one process; only the fields of a recipe need the module of its tier."
    (tmp_path/'unknown.toml').write_text('modls = ["mae"]')
    cases = [("wikichurches_study(tiers='lorra')", 'known are linear, lora, full'), ("wikichurches_study(models='some/folder')", 'alias=source'),
             ("wikichurches_study(geometry='stretch')", 'squash'), ("wikichurches_study(labels='all')", 'leaf'), ("wikichurches_study(seeds='0,x')", "seed 'x'"),
             ("wikichurches_study(tiers='attn_supervised')", 'add full'), ("wikichurches_study(tiers='random_labels')", 'add full'),
             ("wikichurches_study('no.toml')", 'no study file'), ("wikichurches_study('unknown.toml')", "unknown field 'modls'"),
             ("wikichurches_study(recipe='epochs=3')", 'tier.field=value'), ("wikichurches_report('.')", 'no folder of a study'), ("wikichurches_paper('.')", 'no folder of a study'),
             ("wikichurches_tensorboard('.')", 'no folder of a study'), ("wikichurches_paths('.')", 'no folder of a study')]
    script = f"""
import sys
from ssl_wikichurches.cli import *
for call,part in {cases!r}:
    try: eval(call)
    except SystemExit as e: assert part in str(e), (call, str(e))
    else: raise AssertionError(call)
    assert 'torch' not in sys.modules, call
try: wikichurches_study(recipe='lora.rnk=1')
except SystemExit as e: print(e)"""
    assert "LoraRecipe has no field 'rnk'" in python(script, cwd=tmp_path)[0] and not list(tmp_path.glob('runs'))

@pytest.mark.parametrize('command', COMMANDS)
def test_help_of_a_command_loads_nothing(command):
    done = subprocess.run([Path(sys.executable).with_name(command), '--help'], env=os.environ|dict(PYTHONPROFILEIMPORTTIME='1'), capture_output=True, text=True)
    loaded = {line.rsplit('|', 1)[1].strip().partition('.')[0] for line in done.stderr.splitlines() if line.startswith('import time:')}
    assert done.returncode==0 and '--debug' in done.stdout and 'ssl_wikichurches' in loaded and not loaded&{*HEAVY}

def test_what_nobody_expects_leaves_its_traceback(tmp_path, monkeypatch):
    "One line that names the file; the same again with --debug raises."
    def broken(*args, **kwargs): raise RuntimeError(CUDA)
    monkeypatch.chdir(tmp_path); monkeypatch.setattr(cli, 'compose_study', broken)
    with pytest.raises(SystemExit) as said: cli.wikichurches_study(tiers='lora')
    assert str(said.value)==f"wikichurches_study: RuntimeError: CUDA error: an illegal memory access was encountered (traceback in {tmp_path}/wikichurches_study-error.txt)"
    text = (tmp_path/'wikichurches_study-error.txt').read_text()
    assert 'Traceback (most recent call last)' in text and 'in broken' in text and CUDA in text
    with pytest.raises(RuntimeError, match='TORCH_USE_CUDA_DSA'): cli.wikichurches_study(tiers='lora', debug=True)

@pytest.mark.parametrize('error', [ValueError, FileNotFoundError, OSError, RunsFailed])
def test_what_is_expected_is_a_line_alone(error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match='^demo: no such church$'):
        with cli.plain_errors('demo'): raise error('no such church')
    with pytest.raises(error):
        with cli.plain_errors('demo', debug=True): raise error('no such church')
    assert not list(tmp_path.iterdir())

def test_a_traceback_is_written_elsewhere_where_nothing_can_be_written(tmp_path, monkeypatch):
    here,temporary = tmp_path/'gone',tmp_path/'temporary'
    here.mkdir(); temporary.mkdir()
    monkeypatch.setattr(cli.Path, 'cwd', lambda: here/'no'/'more'); monkeypatch.setattr(cli.tempfile, 'gettempdir', lambda: str(temporary))
    with pytest.raises(SystemExit, match='KeyError'):
        with cli.plain_errors('demo'): {}['x']
    assert "KeyError: 'x'" in (temporary/'demo-error.txt').read_text()

def test_every_command_can_raise():
    "--debug stands at every command, and none is left out of the list."
    tree = ast.parse((ROOT/'ssl_wikichurches'/'cli.py').read_text())
    commands = {n.name:[a.arg for a in n.args.args] for n in tree.body if isinstance(n, ast.FunctionDef) and any(getattr(x, 'id', '')=='call_parse' for x in n.decorator_list)}
    assert sorted(commands)==sorted(COMMANDS) and all('debug' in args for args in commands.values())

def study(drawn, runs, models, **flags):
    cli.wikichurches_study(name='bare', data=str(drawn), models=models, tiers='none', size=64, runs=str(runs), workers=1, device='cpu', **flags)

def test_a_study_of_frozen_backbones_prints_its_table_and_gets_a_report(drawn, tmp_path, capsys):
    study(drawn, tmp_path, 'tiny-clip')
    out = capsys.readouterr().out
    assert 'tiny-clip' in out and out.rstrip().endswith(f"report: {tmp_path/'bare'/'report.html'}") and (tmp_path/'bare'/'report.html').stat().st_size>1000

def test_the_line_names_run_exception_and_file(drawn, tmp_path, monkeypatch):
    with pytest.raises(RunsFailed) as failure: study(drawn, tmp_path, 'lost=no/such/folder', debug=True)
    assert 'Traceback' in str(failure.value.__cause__.__cause__) # of the worker
    def fails_so(*args, **kwargs): raise failure.value
    monkeypatch.setattr('ssl_wikichurches.study.runs.run_study', fails_so) # without another worker
    with pytest.raises(SystemExit, match=r"^wikichurches_study: 1 of 1 runs failed.*lost-frozen: ValueError.*\(see .*lost-frozen/error.txt\)$"):
        study(drawn, tmp_path, 'lost=no/such/folder')
