"Mechanics of `archive` and `download`: broken connections, killed processes, full disks, hostile archives, second sources."
import errno, io, multiprocessing, os, random, shutil, signal, stat, subprocess, sys, tarfile, time, zipfile
from pathlib import Path
from types import SimpleNamespace
import pytest
from ssl_wikichurches.data import archive
from ssl_wikichurches.data.archive import NoRange, open_remote_zip, pull, record_files, safe_members, save_member, serve_record, web_session
from ssl_wikichurches.data.churches import read_churches
from ssl_wikichurches.data.download import choose_images, download_churches, load_churches, mirror_shards, read_manifest, unpack_shard, verify_churches
from record_server import REPO, RecordServer, record_of_noise, zipped

FILES,PHOTOS = record_of_noise()
NAMES = list(PHOTOS)

@pytest.fixture
def server():
    with RecordServer(FILES) as s: yield s

@pytest.fixture
def naps(monkeypatch):
    "Waiting of `transfer` is noted, not done."
    done = []
    monkeypatch.setattr(archive, 'time', SimpleNamespace(sleep=done.append))
    return done

def get(server, folder, images='annotated', **kw): return download_churches(folder, images, base=server.base, progress=False, **kw)
def there(folder): return {p.name:p.read_bytes() for p in (folder/'images').iterdir()}
def some(*names): return {n:PHOTOS[n] for n in names}
def parts(folder): return [p.name for p in folder.rglob('*.part')]
def remote(server, name): return record_files(web_session(), server.base)[name]
def without_machine(folder): return {str(p.relative_to(folder)):p.read_bytes() for p in folder.rglob('*') if p.is_file() and p.name!='.download.lock'}

# ---- what comes, and what it costs

def test_annotated_takes_a_small_share(server, tmp_path):
    report = get(server, tmp_path/'wc')
    assert there(tmp_path/'wc')==some(*NAMES[:3]) and parts(tmp_path/'wc')==[]
    sent = sum(len(FILES[n]) for n in FILES if n not in ('images.zip','image_meta.json'))
    cost = server.sent-sent
    assert report.bytes['photographs']==cost<.05*len(FILES['images.zip'])
    assert report.requested.tolist()==[7, 3, 3]==report.fetched.tolist() and not report[['present','missing','damaged']].to_numpy().any()
    for n in ('churches.json','README.md','labels.zip'): assert (tmp_path/'wc'/n).read_bytes()==FILES[n]
    assert not (tmp_path/'wc'/'image_meta.json').exists()
    assert read_manifest(tmp_path/'wc')['selections']==['annotated']

def test_drawn_churches_come_as_they_were(drawn, tmp_path):
    photos = {p.name:p.read_bytes() for p in sorted((drawn/'images').iterdir())} # no folder in this archive, and deflated
    files = {n:(drawn/n).read_bytes() for n in ('churches.json','building_parts.json','style_names.txt','parent_child_rel.txt')}
    with RecordServer(files|{'images.zip':zipped(photos, zipfile.ZIP_DEFLATED)}) as s: get(s, tmp_path/'wc', 'all')
    a,b = read_churches(drawn), load_churches(tmp_path/'wc')
    assert a.images.equals(b.images) and a.boxes.equals(b.boxes) and len(b.problems)==0

@pytest.mark.parametrize('keep', [False, True])
def test_all_takes_the_archive_whole_and_once(server, tmp_path, keep):
    get(server, tmp_path/'wc', 'all', keep=keep, meta=True)
    assert there(tmp_path/'wc')==PHOTOS and (tmp_path/'wc'/'images.zip').exists()==keep
    assert (tmp_path/'wc'/'image_meta.json').read_bytes()==FILES['image_meta.json']
    before = server.sent
    again = get(server, tmp_path/'wc', 'all', keep=keep)
    assert server.sent-before<60_000 and again.present['photographs']==200 # at most the list of the archive
    assert there(tmp_path/'wc')==PHOTOS and (tmp_path/'wc'/'images.zip').exists()==keep

def test_all_takes_a_few_missing_ones_singly(server, tmp_path):
    get(server, tmp_path/'wc', 'all')
    for n in NAMES[:5]: (tmp_path/'wc'/'images'/n).unlink()
    before = server.sent
    assert get(server, tmp_path/'wc', 'all').fetched['photographs']==5
    assert server.sent-before<200_000 and there(tmp_path/'wc')==PHOTOS

def test_selections(server, tmp_path):
    get(server, tmp_path/'wc')
    leaf = choose_images(tmp_path/'wc', 'leaf', NAMES)
    assert set(leaf)=={n for k,n in enumerate(NAMES) if k%5}|set(NAMES[:3])
    get(server, tmp_path/'wc', 'wc4')
    assert there(tmp_path/'wc')==some(*NAMES[:40])
    get(server, tmp_path/'wc', ['Q199_wd0.jpg'])
    assert there(tmp_path/'wc')==some(*NAMES[:40], 'Q199_wd0.jpg')
    assert read_manifest(tmp_path/'wc')['selections']==['annotated','wc4','names'] and verify_churches(tmp_path/'wc').empty

@pytest.mark.parametrize('images, message', [('boxes', 'expected one of annotated'), (['../Q1_wd0.jpg'], 'has a path in it'), (['notes.txt'], 'not of the form')])
def test_what_is_no_selection(server, tmp_path, images, message):
    with pytest.raises(ValueError, match=message): get(server, tmp_path/'wc', images)
    assert read_manifest(tmp_path/'wc')['selections']==[]

def test_missing_and_damaged_are_said(server, tmp_path):
    z = zipfile.ZipFile(io.BytesIO(FILES['images.zip'])); at = z.getinfo('images/Q2_wd0.jpg').header_offset+500
    data = bytearray(FILES['images.zip']); data[at] ^= 1; server.files['images.zip'] = bytes(data)
    report = get(server, tmp_path/'wc', ['Q1_wd0.jpg', 'Q2_wd0.jpg', 'Q3_wd0.jpg', 'Q999_wd0.jpg'])
    assert report.loc['photographs', ['requested','fetched','missing','damaged']].tolist()==[4, 2, 1, 1]
    assert 'Q2_wd0.jpg' in report.note['photographs'] and 'Q999_wd0.jpg' in report.note['photographs']
    assert there(tmp_path/'wc')==some('Q1_wd0.jpg', 'Q3_wd0.jpg') and 'images/Q2_wd0.jpg' not in read_manifest(tmp_path/'wc')['files']
    assert parts(tmp_path/'wc')==[]

def test_size_is_compared_always_and_checksum_on_request(server, tmp_path):
    get(server, tmp_path/'wc')
    short,other = (tmp_path/'wc'/'images'/n for n in NAMES[:2])
    short.write_bytes(PHOTOS[NAMES[0]][:-1]); other.write_bytes(PHOTOS[NAMES[5]])
    assert get(server, tmp_path/'wc').fetched['photographs']==1 and short.read_bytes()==PHOTOS[NAMES[0]]
    assert get(server, tmp_path/'wc', verify=True).fetched['photographs']==1 and other.read_bytes()==PHOTOS[NAMES[1]]

def test_unicode_names(tmp_path):
    data,member = 'Straße'.encode(), 'bilder größe/Q1_wd0 – Küste.jpg'
    with RecordServer(FILES|{'Übersicht – 1.txt':data, 'images.zip':zipped({member:b'photo'})}) as s:
        assert pull(web_session(), remote(s, 'Übersicht – 1.txt'), tmp_path/'Übersicht – 1.txt') and (tmp_path/'Übersicht – 1.txt').read_bytes()==data
        get(s, tmp_path/'Kirchen – Wien', ['Q1_wd0 – Küste.jpg'])
    assert there(tmp_path/'Kirchen – Wien')=={'Q1_wd0 – Küste.jpg':b'photo'}
    assert verify_churches(tmp_path/'Kirchen – Wien').empty and 'images/Q1_wd0 – Küste.jpg' in read_manifest(tmp_path/'Kirchen – Wien')['files']

def test_list_in_the_form_for_large_archives(tmp_path, monkeypatch):
    "The real archive has 12 GB, so its list is written as ZIP64."
    monkeypatch.setattr(zipfile, 'ZIP64_LIMIT', 100_000)
    large = zipped({'images/'+n:PHOTOS[n] for n in NAMES[:40]})
    monkeypatch.undo()
    assert b'PK\x06\x06' in large[-200:] # the ZIP64 end of the list
    with RecordServer(FILES|{'images.zip':large}) as s: get(s, tmp_path/'wc', [NAMES[39]])
    assert there(tmp_path/'wc')==some(NAMES[39])

# ---- the server and the line

@pytest.mark.parametrize('shape', ['list','entries','old'])
@pytest.mark.parametrize('redirect', [False, True])
def test_shapes_of_the_record_and_redirects(server, tmp_path, shape, redirect):
    server.shape,server.redirect = shape,redirect
    assert pull(web_session(), remote(server, 'churches.json'), tmp_path/'c') and (tmp_path/'c').read_bytes()==FILES['churches.json']
    assert [e[4] for e in server.asked('churches.json')]==([302, 200] if redirect else [200])

def test_what_is_no_record(server):
    server.md5['LICENSE'] = 'f00'
    with pytest.raises(OSError, match='does not list files with sizes and checksums.*LICENSE'): record_files(web_session(), server.base)
    server.md5.clear(); server.files['../evil'] = b''
    with pytest.raises(OSError, match='not a bare file name'): record_files(web_session(), server.base)
    with pytest.raises(OSError, match='404'): record_files(web_session(), server.base+'/elsewhere')
    server.listing = lambda: 'under maintenance'
    with pytest.raises(OSError, match='does not list files'): record_files(web_session(), server.base)

def test_waits_as_long_as_the_server_asks(server, tmp_path):
    file = remote(server, 'churches.json'); server.log.clear()
    server.refuse = [(429, {'Retry-After':'2'})]; server.redirect = False
    pull(web_session(), file, tmp_path/'c')
    (t0,*_,s0),(t1,*_,s1) = server.asked('churches.json')
    assert (s0,s1)==(429,200) and 2<=t1-t0<4

@pytest.mark.parametrize('status', [500, 502, 503, 504])
def test_repeats_what_the_server_could_not_do(server, tmp_path, status):
    file = remote(server, 'churches.json'); server.log.clear(); server.redirect = False
    server.refuse = [(status, {})]*2
    pull(web_session(backoff=.01), file, tmp_path/'c')
    assert [e[4] for e in server.asked('churches.json')]==[status, status, 200]
    server.refuse = [(status, {})]*100
    with pytest.raises(OSError, match=str(status)): pull(web_session(retries=3, backoff=.01), file, tmp_path/'d')
    assert len(server.refuse)==96 and not (tmp_path/'d').exists()

def test_goes_on_where_the_line_broke(server, tmp_path, naps):
    file,rng = remote(server, 'images.zip'), random.Random(3)
    server.cuts = [rng.randrange(1, file.size//8) for _ in range(10)]; total = sum(server.cuts); server.log.clear(); server.redirect = False
    assert pull(web_session(), file, tmp_path/'z') and (tmp_path/'z').read_bytes()==FILES['images.zip']
    starts = [int(e[3][6:].split('-')[0]) for e in server.log[1:]]
    assert len(server.log)==11 and starts==sorted(starts) and starts[-1]==total # to the byte
    assert server.sent==file.size

def test_goes_on_inside_a_photograph(server, tmp_path, naps):
    server.redirect = False
    session = web_session()
    with open_remote_zip(session, record_files(session, server.base)['images.zip']) as z:
        for path,m in safe_members(z)[:4]:
            server.cuts = [0, 1, 5000]
            save_member(z, m, tmp_path/path.name, tmp_path/'x.part')
    assert {p.name:p.read_bytes() for p in tmp_path.iterdir()}==some(*NAMES[:4])

def test_gives_up_where_nothing_comes(server, tmp_path, naps):
    file = remote(server, 'images.zip'); server.cuts = [100_000]+[0]*20; server.redirect = False
    with pytest.raises(ConnectionError, match='brought nothing beyond byte 100000'): pull(web_session(), file, tmp_path/'z', patience=4)
    assert (tmp_path/'z.part').read_bytes()==FILES['images.zip'][:100_000] and not (tmp_path/'z').exists()
    assert naps==sorted(naps) and len(naps)==4 and len(server.cuts)==15 # five connections brought nothing
    server.cuts = []
    assert pull(web_session(), file, tmp_path/'z') and (tmp_path/'z').read_bytes()==FILES['images.zip']

def test_nobody_answers(tmp_path):
    with RecordServer({}) as s: base = s.base
    with pytest.raises(OSError): record_files(web_session(retries=1, backoff=.01), base)

def test_a_server_without_ranges_begins_again(server, tmp_path, naps):
    file = remote(server, 'images.zip'); server.ranges,server.cuts = False,[1_000_000, 2_000_000]
    assert pull(web_session(), file, tmp_path/'z') and (tmp_path/'z').read_bytes()==FILES['images.zip'] # a whole file, not parts in a row
    assert [e[4] for e in server.asked('images.zip')]==[200, 200, 200]
    server.cuts = [1_000_000]*20
    with pytest.raises(ConnectionError): pull(web_session(), file, tmp_path/'y', patience=3) # the same megabyte is no progress
    assert len(server.cuts)==15 # one brought it, four no more

def test_a_server_without_ranges_has_only_all(server, tmp_path):
    server.ranges = False
    with pytest.raises(NoRange, match="choose images='all'"): get(server, tmp_path/'wc')
    assert server.sent<2_000_000 and there(tmp_path/'wc')=={} and read_manifest(tmp_path/'wc')['selections']==[]
    get(server, tmp_path/'wc', 'all')
    assert there(tmp_path/'wc')==PHOTOS

@pytest.mark.parametrize('tags', [True, False])
def test_a_file_that_changes_meanwhile(server, tmp_path, naps, tags):
    "The second half is of another file: noticed by its tag, or by the sum."
    server.tags,server.redirect = tags,False
    true = FILES['images.zip']; false = bytes(reversed(true))
    file = remote(server, 'images.zip'); server.files['images.zip'] = false
    server.cuts = _Then([1_000_000], lambda: server.files.update({'images.zip':true}))
    assert pull(web_session(), file, tmp_path/'z') and (tmp_path/'z').read_bytes()==true
    assert [e[4] for e in server.log[1:]]==([200, 200] if tags else [200, 206, 200])

class _Then(list):
    "A list that does something when an item is taken."
    def __init__(self, items, do): super().__init__(items); self.do = do
    def pop(self, i=-1): self.do(); return super().pop(i)

def test_a_file_of_another_size(server, tmp_path):
    file = remote(server, 'images.zip'); server.files['images.zip'] += b'more'
    with pytest.raises(OSError, match='changed since the record was read'): pull(web_session(), file, tmp_path/'z')
    (tmp_path/'z.part').write_bytes(FILES['images.zip'][:1000])
    with pytest.raises(OSError, match='changed since the record was read'): pull(web_session(), file, tmp_path/'z')
    assert not (tmp_path/'z').exists()
    with pytest.raises(OSError, match='changed since'): open_remote_zip(web_session(), file)

def test_a_file_that_is_not_what_the_record_says(server, tmp_path):
    server.md5['churches.json'] = '0'*32
    with pytest.raises(OSError, match='churches.json .* not what the record lists: md5'): get(server, tmp_path/'wc')
    assert not (tmp_path/'wc'/'churches.json').exists() and parts(tmp_path/'wc')==[] and not (tmp_path/'wc'/'download.json').exists()

@pytest.mark.parametrize('left', [b'', b'x'*1000, FILES['images.zip'][:-1], FILES['images.zip'], FILES['images.zip']+b'x'])
def test_whatever_an_earlier_run_left(server, tmp_path, left):
    (tmp_path/'z.part').write_bytes(left)
    assert pull(web_session(), remote(server, 'images.zip'), tmp_path/'z')
    assert (tmp_path/'z').read_bytes()==FILES['images.zip'] and parts(tmp_path)==[]
    assert server.sent==(1 if left==FILES['images.zip'][:-1] else 0 if left==FILES['images.zip'] else
                         2*len(FILES['images.zip'])-1000 if left==b'x'*1000 else len(FILES['images.zip']))

def test_a_file_appears_in_one_step(server, tmp_path, monkeypatch):
    "Where renaming is refused, as at the moment before it, nothing lies under the final name."
    def refuse(a, b): raise PermissionError(b)
    monkeypatch.setattr(os, 'replace', refuse)
    with pytest.raises(PermissionError): pull(web_session(), remote(server, 'churches.json'), tmp_path/'c')
    assert [p.name for p in tmp_path.iterdir()]==['c.part']
    (tmp_path/'z.zip').write_bytes(FILES['images.zip'])
    with zipfile.ZipFile(tmp_path/'z.zip') as z, pytest.raises(PermissionError): save_member(z, safe_members(z)[0][1], tmp_path/'photo', tmp_path/'photo.part')
    assert sorted(p.name for p in tmp_path.iterdir())==['c.part', 'z.zip']

# ---- killed

@pytest.fixture(scope='session')
def process():
    "Starts a function in a process of its own, quickly."
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['ssl_wikichurches.data.download'])
    def start(f, *args, **kw): p = context.Process(target=f, args=args, kwargs=kw); p.start(); return p
    return start

def kill_after(server, process, n, *args, **kw):
    "Run a download and kill it when so many more bytes have been sent; its exit code."
    server.at,server.then = server.sent+n, lambda: os.kill(p.pid, signal.SIGKILL)
    p = process(download_churches, *args, base=server.base, progress=False, **kw)
    p.join(60); server.at = None
    return p.exitcode

@pytest.mark.parametrize('images, kills', [('all', 5), (NAMES[:100], 5)])
def test_killed_at_random_points_and_resumed(server, process, tmp_path, images, kills):
    rng,folder = random.Random(5),tmp_path/'wc'
    whole = sum(len(b) for n,b in FILES.items() if n not in ('images.zip','image_meta.json')) + (len(FILES['images.zip']) if images=='all' else 100*20_000)
    points = sorted(rng.randrange(1, whole-200_000) for _ in range(kills)) # the server is up to 8 KiB late, each time
    for n in (b-a for a,b in zip([0,*points], points)):
        assert kill_after(server, process, max(n, 1), folder, images)==-signal.SIGKILL
        for p in (folder/'images').glob('*') if folder.exists() else (): assert p.read_bytes()==PHOTOS[p.name] # nothing half looks whole
        for p in folder.glob('*') if folder.exists() else ():
            if p.name in FILES: assert p.read_bytes()==FILES[p.name]
        assert not (folder/'download.json').exists() or read_manifest(folder)['selections']==[]
    get(server, folder, images)
    get(server, fresh := tmp_path/'fresh', images)
    a,b = without_machine(folder),without_machine(fresh)
    assert a==b and there(folder)==(PHOTOS if images=='all' else some(*NAMES[:100]))

def test_killed_downloads_are_not_begun_again(server, process, tmp_path):
    "Ten kills cost less than one more download."
    folder = tmp_path/'wc'; get(server, folder); server.sent = 0
    for _ in range(10): assert kill_after(server, process, 350_000, folder, 'all')==-signal.SIGKILL
    assert get(server, folder, 'all').fetched['photographs']==197
    assert there(folder)==PHOTOS and server.sent<2*len(FILES['images.zip'])

# ---- two at once

def test_the_second_process_is_turned_away(server, process, tmp_path):
    folder = tmp_path/'wc'; server.pace = .02
    first = process(download_churches, folder, 'all', base=server.base, progress=False)
    until = time.monotonic()+30
    while not (folder/'images.zip.part').exists() and time.monotonic()<until: time.sleep(.01)
    with pytest.raises(RuntimeError, match='another process is downloading'): get(server, folder, 'all')
    server.pace = 0; first.join(60)
    assert first.exitcode==0 and there(folder)==PHOTOS and verify_churches(folder).empty
    assert get(server, folder, 'all').present['photographs']==200

def test_the_lock_goes_with_a_killed_process(server, process, tmp_path):
    assert kill_after(server, process, 500_000, tmp_path/'wc', 'all')==-signal.SIGKILL
    get(server, tmp_path/'wc')
    assert there(tmp_path/'wc')==some(*NAMES[:3])

# ---- full disks

class FullDisk:
    "Stands for `open`: what is written after `room` bytes does not fit."
    def __init__(self, room): self.room = room
    def __call__(self, path, mode='r', *args, **kw):
        f = open(path, mode, *args, **kw)
        if 'w' not in mode and '+' not in mode: return f
        write = f.write
        def full(data):
            self.room -= write(bytes(data)[:max(self.room, 0)])
            if self.room<=0: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return len(data)
        return SimpleDisk(f, full)

class SimpleDisk:
    def __init__(self, f, write): self._f,self.write = f,write
    def __getattr__(self, name): return getattr(self._f, name)
    def __enter__(self): return self
    def __exit__(self, *a): self._f.close()

@pytest.mark.parametrize('room', [10_000, 700_000, 3_000_000, 4_500_000, 7_000_000]) # in small files, in the archive, in photographs
def test_full_disk_midway(server, tmp_path, monkeypatch, room):
    monkeypatch.setattr(archive, 'open', FullDisk(room), raising=False)
    with pytest.raises(OSError, match='nothing more can be written.*make room and run again') as e: get(server, tmp_path/'wc', 'all')
    assert e.value.errno==errno.ENOSPC and len(str(e.value))<600
    for n,b in FILES.items(): assert not (tmp_path/'wc'/n).exists() or (tmp_path/'wc'/n).read_bytes()==b
    monkeypatch.undo(); server.sent = 0
    held = sum(p.stat().st_size for p in (tmp_path/'wc').iterdir() if p.is_file())
    get(server, tmp_path/'wc', 'all')
    assert there(tmp_path/'wc')==PHOTOS and parts(tmp_path/'wc')==[] and held+server.sent<=sum(map(len, FILES.values()))+100_000 # nothing twice but the list

def test_the_system_refuses_a_larger_file(server, tmp_path):
    "No fault injected: the kernel ends the write at 300,000 bytes."
    code = f"""import resource; from ssl_wikichurches.data.archive import *
session = web_session(); file = record_files(session, {server.base!r})['images.zip']
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try: pull(session, file, {str(tmp_path/'z')!r})
except OSError as e: print(e)"""
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout
    assert 'nothing more can be written' in out and (tmp_path/'z.part').read_bytes()==FILES['images.zip'][:300_000] and not (tmp_path/'z').exists()
    server.sent = 0
    assert pull(web_session(), remote(server, 'images.zip'), tmp_path/'z') and server.sent==len(FILES['images.zip'])-300_000

def test_room_is_compared_first(server, tmp_path, monkeypatch):
    size = len(FILES['images.zip'])
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: SimpleNamespace(free=int(1.5*size)))
    with pytest.raises(OSError, match=r'needs 8\.\d MB, but 6\.\d MB are free'): get(server, tmp_path/'wc', 'all')
    assert server.sent<200_000 and get(server, tmp_path/'wc').fetched['photographs']==3
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: SimpleNamespace(free=30_000))
    with pytest.raises(OSError, match='unpacking 2 photographs needs 40.0 kB'): get(server, tmp_path/'wc', NAMES[3:5])

# ---- hostile archives

def member(name, kind=stat.S_IFREG):
    info = zipfile.ZipInfo(name); info.external_attr = (kind|0o777)<<16; return info

def tarred(*members):
    with tarfile.open(fileobj=(out := io.BytesIO()), mode='w') as t:
        for name,kind,target,data in members:
            m = tarfile.TarInfo(name); m.type,m.linkname,m.size = kind,target,len(data)
            t.addfile(m, io.BytesIO(data))
    return out.getvalue()

WAYS_OUT = ['/tmp/job', '../job', 'images/../../job', 'images/..', '..', 'C:job.jpg', 'c:/job.jpg', '..\\job', 'images\\job.jpg', '\\\\host\\job']

@pytest.mark.parametrize('whole', [False, True])
@pytest.mark.parametrize('name', WAYS_OUT)
def test_archive_with_a_way_out(server, tmp_path, name, whole):
    server.files['images.zip'] = zipped({'images/'+n:PHOTOS[n] for n in NAMES}|{member(name):b'evil'})
    assert_refused(server, tmp_path, 'all' if whole else 'annotated')

@pytest.mark.parametrize('kind', [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK])
@pytest.mark.parametrize('name', ['images/Q150_wd0.jpg', 'images/'])
def test_archive_with_a_link_or_a_device(server, tmp_path, kind, name):
    server.files['images.zip'] = zipped({'images/'+n:PHOTOS[n] for n in NAMES if n not in name}|{member(name, kind):b'' if name.endswith('/') else b'/etc'})
    assert_refused(server, tmp_path, 'annotated')

def test_labels_with_a_way_out(server, tmp_path):
    server.files['labels.zip'] = zipped({'labels/wc4_train.txt':b'', '../wc4_val.txt':b''})
    assert_refused(server, tmp_path, 'annotated')
    assert not (tmp_path/'wc'/'labels').exists()

def assert_refused(server, tmp_path, images):
    with pytest.raises(ValueError, match='the archive is refused, and nothing of it unpacked: its member'): get(server, tmp_path/'wc', images)
    assert {p.name for p in tmp_path.iterdir()}=={'wc'} and not Path('/tmp/job').exists()
    assert not any((tmp_path/'wc'/'images').glob('*')) and read_manifest(tmp_path/'wc')['selections']==[]

@pytest.mark.parametrize('bad', [
    *[(n, tarfile.REGTYPE, '', b'evil') for n in WAYS_OUT], ('Q2_wd0.jpg', tarfile.SYMTYPE, '/etc/passwd', b''), ('Q2_wd0.jpg', tarfile.LNKTYPE, '../x', b''),
    ('Q2_wd0.jpg', tarfile.CHRTYPE, '', b''), ('Q2_wd0.jpg', tarfile.BLKTYPE, '', b''), ('Q2_wd0.jpg', tarfile.FIFOTYPE, '', b''), ('../up', tarfile.DIRTYPE, '', b'')],
    ids=lambda b: f'{b[0]}-{b[1].decode()}')
def test_shard_with_a_way_out(tmp_path, bad):
    (tmp_path/'s.tar').write_bytes(tarred(('Q1_wd0.jpg', tarfile.REGTYPE, '', b'photo'), bad))
    (tmp_path/'wc').mkdir()
    with pytest.raises(ValueError, match='the archive is refused'): unpack_shard(tmp_path/'s.tar', ['Q1_wd0.jpg','Q2_wd0.jpg'], tmp_path/'wc')
    assert {p.name for p in tmp_path.iterdir()}=={'wc','s.tar'} and [*(tmp_path/'wc').rglob('*.jpg')]==[]

def test_two_photographs_of_one_name(server, tmp_path):
    server.files['images.zip'] = zipped({'a/Q1_wd0.jpg':b'one', 'b/Q1_wd0.jpg':b'one'}) # the same twice does no harm
    assert get(server, tmp_path/'wc', ['Q1_wd0.jpg']).fetched['photographs']==1
    server.files['images.zip'] = zipped({'a/Q1_wd0.jpg':b'one', 'b/Q1_wd0.jpg':b'two'})
    with pytest.raises(ValueError, match='two photographs Q1_wd0.jpg, and they differ'): get(server, tmp_path/'wc2', ['Q1_wd0.jpg'])

def test_failures_while_the_list_is_read(server, tmp_path, naps):
    "zipfile takes any failure at the end of a file for a file that is no archive; here it keeps its name."
    session = web_session(retries=1, backoff=.01); file = record_files(session, server.base)['images.zip']
    server.cuts = [0]*50
    with pytest.raises(ConnectionError, match='brought nothing'): open_remote_zip(session, file)
    server.cuts,server.refuse = [],[(503, {})]*9
    with pytest.raises(OSError, match='503'): open_remote_zip(session, file)

def test_what_is_no_archive(server, tmp_path):
    server.files['images.zip'] = b'<html>'*20_000
    with pytest.raises(OSError, match='images.zip.*cannot be read'): get(server, tmp_path/'wc')

def test_an_archive_that_swells(server, tmp_path):
    "A member is never longer than the list says."
    z = bytearray(zipped({'images/Q1_wd0.jpg':b'0'*1_000_000}, zipfile.ZIP_DEFLATED))
    at = z.index(b'PK\x01\x02')+24; z[at:at+4] = (1000).to_bytes(4, 'little')
    server.files['images.zip'] = bytes(z)
    assert get(server, tmp_path/'wc', ['Q1_wd0.jpg']).damaged['photographs']==1 and there(tmp_path/'wc')=={}

# ---- checked again

def flip(path):
    data = bytearray(path.read_bytes()); data[len(data)//2] ^= 1; path.write_bytes(data)

def test_flipped_bytes_are_found_and_fetched_again(server, tmp_path):
    folder = tmp_path/'wc'; get(server, folder, NAMES[:20]); sound = without_machine(folder)
    wrong = ['churches.json', 'labels.zip', 'labels/wc4_val.txt', f'images/{NAMES[7]}']
    for w in wrong: flip(folder/w)
    (folder/'images'/NAMES[9]).unlink(); (folder/'README.md').write_text('cut')
    found = verify_churches(folder)
    assert set(found.file)=={*wrong, f'images/{NAMES[9]}', 'README.md'} and set(found.done)=={''}
    assert found.set_index('file').problem[f'images/{NAMES[9]}']=='missing' and 'crc32' in found.set_index('file').problem[wrong[3]]
    server.sent = 0
    repaired = verify_churches(folder, repair=True)
    assert set(repaired.done)=={'fetched again'} and server.sent<200_000
    after = without_machine(folder)
    assert verify_churches(folder).empty and {n:b for n,b in after.items() if n!='download.json'}=={n:b for n,b in sound.items() if n!='download.json'}

def test_what_cannot_be_repaired_is_said(server, tmp_path):
    folder = tmp_path/'wc'; get(server, folder); flip(folder/'images'/NAMES[0])
    server.files['images.zip'] = zipped({'images/'+n:b'another' for n in NAMES})
    assert verify_churches(folder, repair=True).done.tolist()==['still wrong']
    with pytest.raises(FileNotFoundError, match='has no download.json'): verify_churches(tmp_path)

def test_repair_from_another_address(server, tmp_path):
    folder = tmp_path/'wc'; get(server, folder); flip(folder/'images'/NAMES[0])
    (tmp_path/'copy').mkdir()
    for n,b in FILES.items(): (tmp_path/'copy'/n).write_bytes(b)
    n = len(server.log)
    with serve_record(tmp_path/'copy') as base: assert verify_churches(folder, repair=True, base=base).done.tolist()==['fetched again']
    assert len(server.log)==n and there(folder)==some(*NAMES[:3])

# ---- a mirror

SHARDS = {'data/shard-00.tar':tarred(*[(f'shard/{n}', tarfile.REGTYPE, '', PHOTOS[n]) for n in NAMES[:3]], ('shard/Q1_wd0.json', tarfile.REGTYPE, '', b'{}')),
          'data/shard-01.tar':tarred(*[(n, tarfile.REGTYPE, '', PHOTOS[n]) for n in NAMES[3:]]), 'README.md':b'a mirror'}

@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
    with RecordServer(FILES, SHARDS) as s: yield s

def mirrored(hub, folder, images='annotated', **kw): return get(hub, folder, images, source='mirror', repo=REPO, endpoint=hub.base, **kw)

def test_mirror_fetches_the_shards_it_needs(hub, tmp_path):
    assert list(mirror_shards(REPO, hub.base))==['data/shard-00.tar','data/shard-01.tar']
    report = mirrored(hub, tmp_path/'wc')
    assert there(tmp_path/'wc')==some(*NAMES[:3]) and hub.asked('shard-01.tar')==[] and hub.asked('images.zip')==[]
    assert report.bytes['photographs']==len(SHARDS['data/shard-00.tar']) and not (tmp_path/'wc'/'mirror').exists()
    n = len(hub.asked('shard-00.tar'))
    assert mirrored(hub, tmp_path/'wc').present['photographs']==3 and len(hub.asked('shard-00.tar'))==n
    mirrored(hub, tmp_path/'wc', 'all')
    assert there(tmp_path/'wc')==PHOTOS and len(hub.asked('shard-00.tar'))==n and verify_churches(tmp_path/'wc').empty

def test_mirror_killed_between_shards_goes_on(hub, process, tmp_path):
    hub.at,hub.then = sum(len(FILES[n]) for n in FILES if n!='images.zip')+len(SHARDS['data/shard-00.tar'])+1_000_000, lambda: os.kill(p.pid, signal.SIGKILL)
    p = process(download_churches, tmp_path/'wc', 'all', 'mirror', base=hub.base, repo=REPO, endpoint=hub.base, progress=False)
    p.join(60); assert p.exitcode==-signal.SIGKILL and there(tmp_path/'wc')==some(*NAMES[:3])
    hub.log.clear(); hub.sent = 0
    mirrored(hub, tmp_path/'wc', 'all')
    assert there(tmp_path/'wc')==PHOTOS and hub.asked('shard-00.tar')==[] and hub.sent<=len(SHARDS['data/shard-01.tar'])
    assert verify_churches(tmp_path/'wc').empty

def test_mirror_with_other_suffixes(hub, tmp_path):
    hub.files['building_parts.json'] = FILES['building_parts.json'].replace(b'Q2_wd0.jpg', b'Q2_wd0.png')
    report = mirrored(hub, tmp_path/'wc')
    assert there(tmp_path/'wc')=={'Q1_wd0.jpg':PHOTOS['Q1_wd0.jpg'], 'Q2_wd0.png':PHOTOS['Q2_wd0.jpg'], 'Q3_wd0.jpg':PHOTOS['Q3_wd0.jpg']}
    assert '1 have another suffix in the mirror' in report.note['photographs']
    assert read_manifest(tmp_path/'wc')['files']['images/Q2_wd0.png']['mirror_name']=='Q2_wd0.jpg'

def test_mirror_repair_takes_one_shard(hub, tmp_path):
    mirrored(hub, tmp_path/'wc', 'all'); flip(tmp_path/'wc'/'images'/NAMES[100]); hub.log.clear()
    assert verify_churches(tmp_path/'wc', repair=True, endpoint=hub.base).done.tolist()==['fetched again']
    assert hub.asked('shard-00.tar')==[] and hub.asked('images.zip')==[] and there(tmp_path/'wc')==PHOTOS

def test_mirror_whose_shard_is_not_what_the_hub_lists(hub, tmp_path):
    tree = hub.tree(); data = bytearray(SHARDS['data/shard-00.tar']); data[2000] ^= 1
    hub.shards['data/shard-00.tar'] = bytes(data); hub.tree = lambda: tree
    with pytest.raises(OSError, match='not what the hub lists .sha256'): mirrored(hub, tmp_path/'wc')
    assert there(tmp_path/'wc')=={} if (tmp_path/'wc'/'images').exists() else True
    hub.shards['data/shard-00.tar'] = SHARDS['data/shard-00.tar']
    assert mirrored(hub, tmp_path/'wc').fetched['photographs']==3

def test_mirror_without_shards_or_names(hub, tmp_path):
    hub.shards = {'README.md':b''}
    with pytest.raises(OSError, match='has no .tar files'): mirrored(hub, tmp_path/'wc')
    hub.shards = {'../../evil.tar':b''}
    with pytest.raises(ValueError, match='leads upwards'): mirror_shards(REPO, hub.base)
    hub.files['image_meta.json'] = b'[]'
    with pytest.raises(ValueError, match='not an object by image file name'): mirrored(hub, tmp_path/'wc', 'all')
    with pytest.raises(ValueError, match="source is 'web'"): get(hub, tmp_path/'wc', source='web')

# ---- the entry

def test_load_reads_what_was_downloaded_and_never_downloads(server, tmp_path, monkeypatch):
    monkeypatch.setenv('WIKICHURCHES_CACHE', str(tmp_path))
    with pytest.raises(FileNotFoundError, match='wikichurches_download'): load_churches('wikichurches')
    server.ranges = False # small files come, photographs do not
    with pytest.raises(NoRange): get(server, None)
    with pytest.raises(FileNotFoundError, match='wikichurches_download'): load_churches('wikichurches')
    server.ranges = True; get(server, None)
    n = len(server.log); churches = load_churches('wikichurches')
    assert churches.root==tmp_path/'wikichurches' and list(churches.images.index)==sorted(NAMES[:3]) and len(churches.boxes)==3
    assert len(server.log)==n
    with pytest.raises(OSError, match='cannot decode'): load_churches('wikichurches', verify=True) # noise is no photograph
    flip(tmp_path/'wikichurches'/'images'/NAMES[0]); (tmp_path/'wikichurches'/'images'/NAMES[1]).unlink()
    with pytest.raises(OSError, match='cannot be used.*missing'): load_churches('wikichurches')
    assert len(load_churches('wikichurches', on_error='skip').problems)==1

def test_broken_manifest(server, tmp_path):
    get(server, tmp_path/'wc'); (tmp_path/'wc'/'download.json').write_text('{"files"')
    with pytest.raises(ValueError, match='delete it and run the download again'): get(server, tmp_path/'wc')
    (tmp_path/'wc'/'download.json').unlink()
    assert get(server, tmp_path/'wc').fetched.sum()==0 and verify_churches(tmp_path/'wc').empty

def test_serving_a_folder_survives_bad_requests(tmp_path):
    import requests
    (tmp_path/'a').write_bytes(b'0123456789'); (tmp_path/'sub').mkdir(); (tmp_path/'sub'/'b').write_bytes(b'')
    with serve_record(tmp_path) as base:
        status = lambda path, **h: requests.get(base+path, headers=h).status_code
        assert [status(p) for p in ('/a', '/a/content', '/b', '/../a', '/%2e%2e/%2e%2e/etc/passwd', '/api/records/1')]==[200, 200, 404, 200, 404, 404]
        assert (status('/a', Range='bytes=3-5'), status('/a', Range='bytes=10-'), status('/a', Range='lines=1-2'))==(206, 416, 200)
        assert requests.get(base+'/a', headers={'Range':'bytes=3-5'}).content==b'345'
