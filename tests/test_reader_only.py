"One way into a study's folder: no module of `study`, and no command, but the reader opens what a run holds."
import ast, re
from pathlib import Path
import pytest

PACKAGE = Path(__file__).parents[1]/'ssl_wikichurches'
STUDY = PACKAGE/'study'
WRITERS = {'runs','folders'} # write runs, and read what a killed one left
OPENS = {'read_parquet','read_table','ParquetFile','load_maps','load_features','load_file','safe_open','load_run','load_split','read_tensors','read_csv','read_text','read_bytes','open'}
ALLOWED = {'analysis':{'read_csv','read_text','read_tensors'}, 'explorer':{'read_text'}, 'doctor':{'read_text'}, 'pages':{'read_text'}, 'plan':{'read_text'}, 'cli':{'read_text'}, 'costs':{'read_text'}, 'earlier':{'open'}, 'paper':{'read_csv'}, 'calibration':{'read_csv'}} # its own tables and examples; templates; what is installed here; sources; a study file, twice; the system's counters; files of another study; the table of paths; the table of worlds
RUN_FILE = r'(recipe|run)\.json|(history|predictions|moments)\.csv|(maps|model|best|last|moments)\.safetensors|(metrics|means|received|moments)\.parquet|start(-means)?\.'

def used(tree):
    "All names and attributes, called or handed on."
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)): yield node.id if isinstance(node, ast.Name) else node.attr

def texts(tree):
    "Texts of a module, without docstrings."
    docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    return [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in docs]

def named_files(tree): return [t for t in texts(tree) if re.search(RUN_FILE, t) and not any(c.isspace() for c in t) and t!='moments.parquet'] # whether that is there is asked of the reader

@pytest.mark.parametrize('path', [*sorted(p for p in STUDY.glob('[a-z]*.py') if p.stem not in {'reader',*WRITERS}), PACKAGE/'cli.py'], ids=lambda p: p.stem)
def test_only_the_reader_opens_a_run(path):
    tree = ast.parse(path.read_text())
    assert not {*used(tree)}&OPENS-ALLOWED.get(path.stem, set()), 'ask `open_study` for it'
    assert not named_files(tree), 'a file of a run is named'

def test_the_check_sees_what_it_looks_for():
    "Of the reader, which does all of this, and of a line that would be found."
    tree = ast.parse((STUDY/'reader.py').read_text())
    assert {'ParquetFile','load_maps','safe_open','read_csv','load_file'}<={*used(tree)} and {'predictions.csv','start.parquet'}<={*named_files(tree)}
    wrong = ast.parse("[*map(pd.read_parquet, [folder/'metrics.parquet'])]")
    assert OPENS&{*used(wrong)}=={'read_parquet'} and named_files(wrong)==['metrics.parquet']
