"One way into a study's folder: no module of `study` but the reader opens what a run holds."
import ast
from pathlib import Path
import pytest

STUDY = Path(__file__).parents[1]/'ssl_wikichurches'/'study'
WRITERS = {'runs','folders'} # write runs, and read what a killed one left
OPENS = {'read_parquet','read_table','ParquetFile','load_maps','load_features','load_file','safe_open','load_run','load_split','read_tensors','read_csv','read_text','read_bytes','open'}
ALLOWED = {'analysis':{'read_csv','read_text','read_tensors'}, 'explorer':{'read_text'}, 'doctor':{'read_text'}, 'pages':{'read_text'}, 'plan':{'read_text'}, 'costs':{'read_text'}, 'earlier':{'open'}, 'paper':{'read_csv'}, 'calibration':{'read_csv'}} # its own tables and examples; templates; what is installed here; sources; a study file; the system's counters; files of another study; the table of paths; the table of worlds
FILES = ('recipe.json','run.json','history.csv','predictions.csv','model.safetensors','maps.safetensors','features.safetensors','metrics.parquet','means.parquet','start.')

def calls(tree):
    "Names of all functions and methods that are called."
    for node in ast.walk(tree):
        if isinstance(node, ast.Call): yield node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, 'id', '')

def texts(tree):
    "Texts of a module, without docstrings."
    docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    return [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in docs]

@pytest.mark.parametrize('path', sorted(p for p in STUDY.glob('[a-z]*.py') if p.stem not in {'reader',*WRITERS}), ids=lambda p: p.stem)
def test_only_the_reader_opens_a_run(path):
    tree = ast.parse(path.read_text())
    assert not {*calls(tree)}&OPENS-ALLOWED.get(path.stem, set())
    assert not [t for t in texts(tree) if any(f in t for f in FILES) and not any(c.isspace() for c in t) and t!='features.safetensors'], 'a file of a run is named'

def test_the_check_sees_what_it_looks_for():
    "Of the reader, which does all of this."
    tree = ast.parse((STUDY/'reader.py').read_text())
    assert {'ParquetFile','load_maps','safe_open','read_csv','load_file'}<={*calls(tree)} and any('predictions.csv' in t for t in texts(tree))
