"A server with the manners, and on request the bad manners, of the record of WikiChurches and of its mirror. For tests."
import hashlib, json, random, re, socket, threading, time, zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from urllib.parse import quote, unquote, urlsplit

RECORD, REPO = '5166987', 'someone/Mirror'
STYLES = ('Q46261', 'Q176483', 'Q236122', 'Q840829')

def zipped(members, how=zipfile.ZIP_STORED):
    "Bytes of an archive of {name: bytes}; a ZipInfo may stand for a name."
    with zipfile.ZipFile(out := BytesIO(), 'w', how) as z:
        for name,data in members.items(): z.writestr(name, data)
    return out.getvalue()

def record_of_noise(n=200, annotated=3, size=20_000, seed=0, prefix='images/'):
    "Files of a record: n photographs of incompressible bytes, one of each church, the first ones annotated."
    rng = random.Random(seed)
    photos = {f'Q{k+1}_wd0.jpg':rng.randbytes(size) for k in range(n)}
    names = list(photos)
    styles = lambda k: [STYLES[k%4]] if k%5 else [STYLES[0], STYLES[1]]
    churches = {f'Q{k+1}':dict(id=f'Q{k+1}', name=f'Église {k+1}', built_year=1200, styles=styles(k)) for k in range(n)}
    box = dict(label=0, left=.1, top=.1, width=.2, height=.2)
    parts = dict(meta=[dict(name='Portal', parents=[])], annotations={
        m:dict(styles=[STYLES[0]], bbox_groups=[dict(group_label=0, elements=[box])]) for m in names[:annotated]})
    lists = {f'labels/wc4_{p}.txt':''.join(f'{m} {STYLES[0]}\n' for m in names[a:b]).encode() for p,a,b in (('train',0,20), ('val',20,25), ('test',25,40))}
    files = {'churches.json':json.dumps(churches, ensure_ascii=False).encode(), 'building_parts.json':json.dumps(parts).encode(),
             'style_names.txt':'\n'.join(f'{q} Style {q}' for q in STYLES).encode(), 'parent_child_rel.txt':b'Q46261 Q1\n',
             'image_meta.json':json.dumps({m:{} for m in names}).encode(), 'README.md':b'# WikiChurches', 'LICENSE':b'CC',
             'labels.zip':zipped(lists), 'images.zip':zipped({prefix+m:d for m,d in photos.items()})}
    return files, photos

class RecordServer:
    "`with RecordServer(files) as s:` serves at `s.base`. Change its attributes while it runs."
    def __init__(self, files, shards=None):
        self.files,self.shards = dict(files),dict(shards or {}) # name -> bytes
        self.md5 = {} # name -> what the list says instead of the truth
        self.shape = 'list' # of the answer: 'list', 'entries' or 'old'
        self.ranges,self.redirect,self.tags = True,False,True
        self.cuts = [] # the next answers with a body break off after so many bytes
        self.refuse = [] # the next requests are answered with (status, headers)
        self.pace = 0 # seconds to wait after every 8 KiB
        self.at,self.then = None,None # when so many bytes of files have been sent, call
        self.log,self.sent = [],0 # (time, method, path, range, status), bytes of files
        self.lock = threading.Lock()
    def __enter__(self):
        self.http = ThreadingHTTPServer(('127.0.0.1',0), type('Handler', (_Handler,), dict(owner=self)))
        self.http.daemon_threads = True; self.http.handle_error = lambda *a: None
        self.base = f'http://127.0.0.1:{self.http.server_port}'
        threading.Thread(target=self.http.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start()
        return self
    def __exit__(self, *a): self.http.shutdown(); self.http.server_close()
    def asked(self, name): return [e for e in self.log if name in unquote(e[2])]
    def listing(self):
        digest = lambda n: self.md5.get(n) or hashlib.md5(self.files[n]).hexdigest()
        url = lambda n: f'{self.base}/api/files/bucket/{quote(n)}'
        if self.shape=='old': return dict(files=[dict(filename=n, filesize=len(b), checksum=digest(n), links=dict(download=url(n))) for n,b in self.files.items()])
        if self.shape=='entries':
            return dict(files=dict(enabled=True, entries={n:dict(key=n, size=len(b), checksum='md5:'+digest(n), links=dict(
                self=f'{self.base}/about/{quote(n)}', content=url(n)+'/content')) for n,b in self.files.items()}))
        return dict(files=[dict(id='0', key=n, size=len(b), checksum='md5:'+digest(n), links=dict(self=url(n))) for n,b in self.files.items()])
    def tree(self):
        return [dict(type='file', path=n, size=len(b), oid='0'*40, lfs=dict(oid=hashlib.sha256(b).hexdigest(), size=len(b), pointerSize=1)) for n,b in self.shards.items()]

class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def setup(self):
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384) # what is sent has nearly arrived
        super().setup()
    def log_message(self, *a): pass
    def do_HEAD(self): self.do_GET()
    def do_GET(self):
        o,path = self.owner, unquote(urlsplit(self.path).path)
        with o.lock: refused = o.refuse.pop(0) if o.refuse else None
        if refused: return self.answer(refused[0], b'busy', refused[1])
        if path==f'/api/records/{RECORD}': return self.answer(200, json.dumps(o.listing()).encode(), {'Content-Type':'application/json'})
        if path.startswith(f'/api/datasets/{REPO}/tree/'): return self.answer(200, json.dumps(o.tree()).encode(), {'Content-Type':'application/json'})
        if path.startswith('/api/files/') and o.redirect: return self.answer(302, b'', {'Location':'/elsewhere/'+quote(path.removesuffix('/content').rpartition('/')[2])})
        name = path.split('/resolve/main/')[-1] if '/resolve/' in path else path.removesuffix('/content').rpartition('/')[2]
        data = (o.shards if '/resolve/' in path else o.files).get(name)
        if data is None: return self.answer(404, b'no such file', {})
        self.file(data, {'X-Repo-Commit':'0'*40} if '/resolve/' in path else {})
    def answer(self, status, body, headers):
        self.note(status); self.send_response(status)
        for k,v in headers.items(): self.send_header(k, v)
        self.send_header('Content-Length', len(body)); self.end_headers()
        if self.command!='HEAD': self.wfile.write(body)
    def note(self, status): self.owner.log.append((time.monotonic(), self.command, self.path, self.headers.get('Range'), status))
    def file(self, data, headers):
        o,tag = self.owner, f'"{hashlib.sha256(data).hexdigest()}"'
        asked = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range') or '') if o.ranges else None
        if asked and self.headers.get('If-Range', tag)!=tag: asked = None
        first,last = (int(asked[1]), min(int(asked[2] or len(data)), len(data)-1)) if asked else (0, len(data)-1)
        if asked and first>last: return self.answer(416, b'', {'Content-Range':f'bytes */{len(data)}'})
        self.note(206 if asked else 200); self.send_response(206 if asked else 200)
        if asked: headers = headers|{'Content-Range':f'bytes {first}-{last}/{len(data)}'}
        if o.tags: headers = headers|{'ETag':tag}
        for k,v in headers.items(): self.send_header(k, v)
        self.send_header('Content-Length', last-first+1); self.end_headers()
        if self.command!='HEAD': self.body(data[first:last+1])
    def body(self, data):
        o = self.owner
        with o.lock: cut = o.cuts.pop(0) if o.cuts else None
        if cut is not None: data = data[:cut]
        for i in range(0, len(data), 8192):
            self.wfile.write(data[i:i+8192]); self.wfile.flush()
            with o.lock:
                o.sent += len(data[i:i+8192])
                due = o.at is not None and o.sent>=o.at
                if due: o.at = None
            if due: o.then(); time.sleep(.05)
            if o.pace: time.sleep(o.pace)
        if cut is not None: self.close_connection = True; self.connection.shutdown(socket.SHUT_RDWR)
