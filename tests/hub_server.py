"A stand-in for the Hugging Face hub: repositories are made, pushed to, listed and read over its HTTP interface. For tests."
import base64, hashlib, json, re, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

class HubServer:
    "`with HubServer() as hub:` serves at `hub.base`; the token is `secret`."
    def __init__(self): self.repos,self.large,self.log,self.gated = {},{},[],set() # repo -> {path: bytes}; sha256 -> bytes; (method, path)
    def __enter__(self):
        self.http = ThreadingHTTPServer(('127.0.0.1',0), type('Handler', (_Handler,), dict(hub=self)))
        self.http.daemon_threads = True
        self.base = f'http://127.0.0.1:{self.http.server_port}'
        threading.Thread(target=self.http.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start()
        return self
    def __exit__(self, *a): self.http.shutdown(); self.http.server_close()
    def commit(self, repo): # the address of what a repository holds
        return hashlib.sha1(repr(sorted((k,hashlib.sha256(v).hexdigest()) for k,v in self.repos[repo].items())).encode()).hexdigest()

class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def log_message(self, *a): pass
    def do_GET(self): self.serve()
    def do_HEAD(self): self.serve()
    def do_POST(self): self.serve()
    def do_PUT(self): self.serve()

    def answer(self, body, status=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for k,v in headers.items(): self.send_header(k.replace('_','-'), v)
        self.send_header('Content-Length', len(body)); self.end_headers()
        if self.command!='HEAD': self.wfile.write(body)

    def serve(self):
        path,body = unquote(urlsplit(self.path).path),self.rfile.read(int(self.headers.get('Content-Length') or 0))
        self.hub.log.append((self.command, path))
        if self.command in ('POST','PUT') and not path.startswith('/large/') and self.headers.get('Authorization')!='Bearer secret': return self.answer(dict(error='no'), 401)
        for pattern,do in self.ROUTES.items():
            if found := re.fullmatch(pattern, path): return do(self, body, *found.groups())
        self.answer(dict(error=f'no such thing: {path}'), 404)

    def create(self, body):
        said = json.loads(body)
        repo = f"{said.get('organization') or 'me'}/{said['name']}"
        if repo in self.hub.repos: return self.answer(dict(error='there is one', url=f'{self.hub.base}/{repo}'), 409)
        self.hub.repos[repo] = {}
        self.answer(dict(url=f'{self.hub.base}/{repo}'))
    def validate(self, body): # the head of a card; the hub itself wants a license there
        known = 'license:' in json.loads(body)['content']
        self.answer(dict(errors=[] if known else [dict(message='no license')], warnings=[]), 200 if known else 400)
    def preupload(self, body, repo):
        kind = lambda f: 'lfs' if f['path'].endswith('.safetensors') else 'regular'
        self.answer(dict(files=[dict(path=f['path'], uploadMode=kind(f), shouldIgnore=False) for f in json.loads(body)['files']]))
    def batch(self, body, repo):
        objects = json.loads(body)['objects']
        self.answer(dict(transfer='basic', objects=[dict(o, actions=dict(upload=dict(href=f"{self.hub.base}/large/{o['oid']}"))) for o in objects]))
    def put(self, body, oid):
        assert hashlib.sha256(body).hexdigest()==oid
        self.hub.large[oid] = body
        self.answer(b'')
    def write(self, body, repo):
        for line in body.splitlines():
            value = (said := json.loads(line))['value']
            if said['key']=='file': self.hub.repos[repo][value['path']] = base64.b64decode(value['content'])
            if said['key']=='lfsFile': self.hub.repos[repo][value['path']] = self.hub.large[value['oid']]
        sha = self.hub.commit(repo)
        self.answer(dict(success=True, commitUrl=f'{self.hub.base}/{repo}/commit/{sha}', commitOid=sha, hookOutput=''))
    def info(self, body, repo, _):
        if repo not in self.hub.repos: return self.answer(dict(error='Repository not found'), 404, X_Error_Code='RepoNotFound')
        self.answer(dict(_id='1', id=repo, modelId=repo, sha=self.hub.commit(repo), private=False, tags=[], downloads=0, likes=0,
                         siblings=[dict(rfilename=k) for k in self.hub.repos[repo]]))
    def tree(self, body, repo, _):
        self.answer([dict(type='file', path=k, size=len(v), oid=hashlib.sha1(v).hexdigest()) for k,v in self.hub.repos[repo].items()])
    def read(self, body, repo, path):
        if repo in self.hub.gated and self.headers.get('Authorization')!='Bearer secret': return self.answer(b'', 401, X_Error_Code='GatedRepo')
        data = self.hub.repos.get(repo, {}).get(path)
        if data is None: return self.answer(b'', 404, X_Error_Code='EntryNotFound')
        self.answer(data, X_Repo_Commit=self.hub.commit(repo), ETag=f'"{hashlib.sha1(data).hexdigest()}"')

    ROUTES = {'/api/repos/create':create, '/api/validate-yaml':validate, r'/api/models/([\w.-]+/[\w.-]+)/preupload/main':preupload, r'/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch':batch,
              r'/large/(\w+)':put, r'/api/models/([\w.-]+/[\w.-]+)/commit/main':write, r'/api/models/([\w.-]+/[\w.-]+)(/revision/\w+)?':info,
              r'/api/models/([\w.-]+/[\w.-]+)/tree/(\w+)':tree, r'/([\w.-]+/[\w.-]+)/resolve/\w+/(.+)':read}
