"Photographs as they come: formats, modes, flags, broken and huge files, against pixels made here; and small copies for training."
import io, json, os, shutil, signal, struct, subprocess, sys, time, warnings, zlib
from dataclasses import replace
from pathlib import Path
import numpy as np, pytest, torch
import ssl_wikichurches.data.churches as data_module
from PIL import Image
from torchvision.transforms import v2
from ssl_wikichurches.data import codec
from ssl_wikichurches.data.codec import MARGIN, check_image, image_header, image_size, open_image
from ssl_wikichurches.data.churches import PREPARED_RECORD, ChurchDataset, box_mask, boxes_in_view, eval_transform, read_churches, read_prepared
from ssl_wikichurches.data.prepare import prepare, prepare_report

def pixels(path, side=None): return np.asarray(open_image(path, side)).astype(int)
def noise(h, w, *channels, seed=0, dtype=np.uint8, top=256): return np.random.default_rng(seed).integers(0, top, (h,w,*channels)).astype(dtype)

def smooth(h, w):
    "A color picture without fine detail, which survives JPEG."
    y,x = np.mgrid[:h,:w]
    return np.stack([255*x/(w-1), 255*y/(h-1), 127+100*np.sin(4*x/w+3*y/h)], -1).round().astype(np.uint8)

def tall_jpeg(path, times, width=15008):
    "A JPEG of width x (16*times) pixels: restart intervals let one row of blocks be repeated without holding the picture."
    out = io.BytesIO()
    Image.fromarray(smooth(16, width)).save(out, 'JPEG', quality=90, restart_marker_rows=1)
    data = bytearray(out.getvalue())
    sof = data.index(b'\xff\xc0')
    data[sof+5:sof+7] = struct.pack('>H', 16*times)
    sos = data.index(b'\xff\xda')
    start = sos+2+struct.unpack('>H', data[sos+2:sos+4])[0]
    row = bytes(data[start:-2])
    with open(path, 'wb') as f:
        f.write(data[:start])
        for i in range(times): f.write(row+(bytes([255,0xd0+i%8]) if i<times-1 else b''))
        f.write(b'\xff\xd9')

def flat_png(path, w, h, color):
    "An RGB PNG of one color, written row by row."
    chunk = lambda kind, body: struct.pack('>I', len(body))+kind+body+struct.pack('>I', zlib.crc32(kind+body))
    pack,row = zlib.compressobj(1), b'\0'+bytes(color)*w
    body = b''.join(pack.compress(row) for _ in range(h))+pack.flush()
    path.write_bytes(b'\x89PNG\r\n\x1a\n'+chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 8, 2, 0, 0, 0))+chunk(b'IDAT', body)+chunk(b'IEND', b''))

# ---- modes and formats

@pytest.mark.parametrize('how', [dict(format='PNG'), dict(format='TIFF'), dict(format='TIFF', compression='tiff_lzw'), dict(format='TIFF', compression='tiff_adobe_deflate'),
                                 dict(format='BMP'), dict(format='WEBP', lossless=True)], ids=lambda h: '-'.join(map(str, h.values())))
@pytest.mark.parametrize('suffix', ['jpg', 'png', 'none'])
def test_lossless_formats_by_content_not_suffix(how, suffix, tmp_path):
    a = noise(37, 53, 3)
    Image.fromarray(a).save(p := tmp_path/f'a.{suffix}', **how)
    assert (pixels(p)==a).all() and image_size(p)==(53,37) and image_header(p)['format']==how['format']

def test_tiled_and_multipage_tiff(tmp_path):
    first,second = noise(64, 64, 3), noise(64, 64, 3, seed=1)
    Image.fromarray(first).save(tmp_path/'pages.tif', save_all=True, append_images=[Image.fromarray(second)], compression='tiff_lzw')
    assert (pixels(tmp_path/'pages.tif')==first).all()
    # a tiled TIFF by hand: four uncompressed gray tiles of 32 x 32 pixels
    a = noise(64, 64)
    tiles = [a[y:y+32,x:x+32].tobytes() for y in (0,32) for x in (0,32)]
    tags = [(256,3,1,64), (257,3,1,64), (258,3,1,8), (259,3,1,1), (262,3,1,1), (277,3,1,1), (322,3,1,32), (323,3,1,32), (324,4,4,None), (325,4,4,None)]
    ifd = 8; table = ifd+2+12*len(tags)+4; data = table+32
    body = struct.pack('<2sHI', b'II', 42, ifd)+struct.pack('<H', len(tags))
    for tag,kind,n,value in tags: body += struct.pack('<HHII', tag, kind, n, table if tag==324 else table+16 if tag==325 else value)
    body += struct.pack('<I', 0)+struct.pack('<4I', *(data+1024*i for i in range(4)))+struct.pack('<4I', *[1024]*4)+b''.join(tiles)
    (tmp_path/'tiled.tif').write_bytes(body)
    assert (pixels(tmp_path/'tiled.tif')==a[...,None]).all()

def test_gray_and_one_bit(tmp_path):
    g,b = noise(20, 30), noise(20, 30, top=2)*255
    Image.fromarray(g).save(tmp_path/'g.png'); Image.fromarray(b).convert('1').save(tmp_path/'b.png')
    Image.fromarray(b).convert('1').save(tmp_path/'b.tif', compression='group4')
    assert (pixels(tmp_path/'g.png')==g[...,None]).all()
    assert (pixels(tmp_path/'b.png')==b[...,None]).all() and (pixels(tmp_path/'b.tif')==b[...,None]).all()

@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_sixteen_bits_span_their_range(suffix, tmp_path):
    a = np.linspace(0, 65535, 64*64).round().astype(np.uint16).reshape(64,64)
    Image.fromarray(a).save(p := tmp_path/f'a.{suffix}')
    assert image_header(p)['mode']=='I;16'
    assert (pixels(p)==np.rint(a/257)[...,None]).all()
    dim = (a//16).astype(np.uint16) # a dark scan stays dark: the range is that of the format
    Image.fromarray(dim).save(p)
    assert pixels(p).max()==round(4095/257)

def gray_tiff(path, values, bits, white_is_zero=False, order='<'):
    "An uncompressed gray TIFF of whole numbers, by hand; 12 bits are packed."
    h,w = values.shape
    if bits==16: body = values.astype(order+'u2').tobytes()
    else: body = b''.join(bytes([a>>4, (a&15)<<4|b>>8, b&255]) for a,b in values.reshape(-1,2).tolist())
    tags = [(256,w), (257,h), (258,bits), (259,1), (262,0 if white_is_zero else 1), (273,8+2+12*8+4), (277,1), (279,len(body))]
    head = struct.pack(order+'2sHI', b'II' if order=='<' else b'MM', 42, 8)+struct.pack(order+'H', len(tags))
    for tag,v in tags: head += struct.pack(order+'HHI', tag, 4, 1)+struct.pack(order+'I', v)
    path.write_bytes(head+struct.pack(order+'I', 0)+body)

def test_twelve_bits_and_white_is_zero_and_byte_order(tmp_path):
    a = np.linspace(0, 4095, 32*32).round().astype(int).reshape(32,32)
    gray_tiff(tmp_path/'12.tif', a, 12)
    assert np.abs(pixels(tmp_path/'12.tif')-np.rint(a*255/4095)[...,None]).max()==0
    b = a*16
    gray_tiff(tmp_path/'white.tif', b, 16, white_is_zero=True)
    assert (pixels(tmp_path/'white.tif')==np.rint((65535-b)/257)[...,None]).all()
    gray_tiff(tmp_path/'big.tif', b, 16, order='>')
    assert (pixels(tmp_path/'big.tif')==np.rint(b/257)[...,None]).all()

@pytest.mark.parametrize('values,expected', [(np.float32([[0,.5,1]]), [0,128,255]), (np.float32([[0,100,200]]), [0,100,200]), (np.float32([[-1,0,1]]), [0,128,255]),
                                             (np.int32([[0,100,255]]), [0,100,255]), (np.int32([[0,32896,65535]]), [0,128,255]), (np.int32([[-10,0,10]]), [0,128,255]),
                                             (np.int32([[7,7,7]]), [7,7,7]), (np.int32([[-7,-7,-7]]), [0,0,0]), (np.float32([[0,50000,100000]]), [0,128,255])])
def test_whole_numbers_and_floats(values, expected, tmp_path):
    Image.fromarray(values).save(tmp_path/'a.tif')
    assert pixels(tmp_path/'a.tif')[0,:,0].tolist()==pytest.approx(expected, abs=1)

@pytest.mark.parametrize('value', [np.nan, np.inf])
@pytest.mark.parametrize('at', [0, 5])
def test_floats_that_are_not_finite(value, at, tmp_path):
    a = np.linspace(0, 1, 9, dtype=np.float32)[None]; a[0,at] = value
    Image.fromarray(a).save(tmp_path/'a.tif')
    assert 'a.tif' in check_image(tmp_path/'a.tif')

def over_white(rgb, alpha): return rgb*(alpha/255)+255*(1-alpha/255)

def test_transparency_shows_white(tmp_path):
    rgba,la = noise(24, 24, 4), noise(24, 24, 2)
    Image.fromarray(rgba).save(tmp_path/'rgba.png'); Image.fromarray(rgba).save(tmp_path/'rgba.tif')
    Image.fromarray(rgba).save(tmp_path/'rgba.webp', lossless=True, exact=True)
    Image.fromarray(la).save(tmp_path/'la.png')
    for n in ('rgba.png', 'rgba.tif', 'rgba.webp'): assert np.abs(pixels(tmp_path/n)-over_white(rgba[...,:3], rgba[...,3:])).max()<=1
    assert np.abs(pixels(tmp_path/'la.png')-over_white(la[...,:1], la[...,1:])).max()<=1

def test_palettes_with_and_without_transparency(tmp_path):
    index = noise(24, 24, top=4); colors = noise(1, 4, 3)[0]
    im = Image.fromarray(index); im = im.convert('P'); im.putpalette(colors.tobytes())
    im.frombytes(index.tobytes())
    im.save(tmp_path/'p.png'); im.save(tmp_path/'p.gif')
    im.save(tmp_path/'t.png', transparency=bytes([255,0,128,255]))
    im.save(tmp_path/'t.gif', transparency=2)
    rgb,alpha = colors[index], np.array([255,0,128,255])[index][...,None]
    assert (pixels(tmp_path/'p.png')==rgb).all() and (pixels(tmp_path/'p.gif')==rgb).all()
    assert np.abs(pixels(tmp_path/'t.png')-over_white(rgb, alpha)).max()<=1
    assert (pixels(tmp_path/'t.gif')==np.where(index[...,None]==2, 255, rgb)).all()

def test_color_key_transparency(tmp_path):
    a = noise(16, 16, 3); a[:8] = (1,2,3)
    Image.fromarray(a).save(tmp_path/'k.png', transparency=(1,2,3))
    assert (pixels(tmp_path/'k.png')==np.where((a==(1,2,3)).all(-1, keepdims=True), 255, a)).all()

def ink(rgb): return np.concatenate([255-rgb, np.zeros_like(rgb[...,:1])], -1) # without black

@pytest.mark.parametrize('side', [None, 16])
def test_cmyk_jpeg(side, tmp_path):
    a = smooth(160, 240)
    Image.frombytes('CMYK', (240,160), ink(a).tobytes()).save(tmp_path/'c.jpg', quality=95)
    expected = a if side is None else np.asarray(Image.fromarray(a).reduce(4))
    assert image_header(tmp_path/'c.jpg')['mode']=='CMYK' and np.abs(pixels(tmp_path/'c.jpg', side)-expected).mean()<3

def test_ycck_jpeg(tmp_path):
    a = smooth(160, 240)
    ycc = np.asarray(Image.fromarray(255-a).convert('YCbCr')) # libjpeg makes YCCK from 255-C, and Adobe's C is 255-ink: so it is the ink's YCbCr,
    planes = np.concatenate([ycc, np.full_like(ycc[...,:1], 255)], -1) # and 255-black
    out = io.BytesIO()
    Image.frombytes('CMYK', (240,160), (255-planes).tobytes()).save(out, 'JPEG', quality=97) # PIL inverts when it saves
    data = bytearray(out.getvalue())
    adobe = data.index(b'Adobe')
    assert data[adobe+11]==0
    data[adobe+11] = 2 # the flag that says YCCK
    (tmp_path/'y.jpg').write_bytes(data)
    assert np.abs(pixels(tmp_path/'y.jpg')-a).mean()<3

@pytest.mark.parametrize('how', [dict(), dict(progressive=True), dict(subsampling='4:4:4'), dict(restart_marker_rows=1)], ids=str)
def test_jpeg_is_what_pil_decodes(how, tmp_path):
    Image.fromarray(smooth(90, 131)).save(tmp_path/'a.jpg', quality=90, **how)
    with Image.open(tmp_path/'a.jpg') as im: assert (pixels(tmp_path/'a.jpg')==np.asarray(im)).all()
    Image.fromarray(smooth(90, 131)[...,0]).save(tmp_path/'g.jpg', quality=95, **{k:v for k,v in how.items() if k!='subsampling'})
    assert np.abs(pixels(tmp_path/'g.jpg')-smooth(90, 131)[...,:1]).max()<8

# what a viewer shows at [row, column] of the upright picture, by the definition of the flag: (stored row, stored column)
FLAGS = {1:lambda r,c,h,w: (r,c), 2:lambda r,c,h,w: (r,w-1-c), 3:lambda r,c,h,w: (h-1-r,w-1-c), 4:lambda r,c,h,w: (h-1-r,c),
         5:lambda r,c,h,w: (c,r), 6:lambda r,c,h,w: (h-1-c,r), 7:lambda r,c,h,w: (h-1-c,w-1-r), 8:lambda r,c,h,w: (c,w-1-r)}

@pytest.mark.parametrize('kind', ['PNG', 'TIFF', 'WEBP', 'JPEG'])
@pytest.mark.parametrize('flag', FLAGS)
def test_all_eight_orientations(flag, kind, tmp_path):
    a = smooth(40, 64); h,w = a.shape[:2]
    upright = [(h,w),(w,h)][flag>=5]
    r,c = np.mgrid[:upright[0],:upright[1]]
    expected = a[FLAGS[flag](r, c, h, w)]
    exif = Image.Exif(); exif[0x0112] = flag
    Image.fromarray(a).save(p := tmp_path/'a', kind, exif=exif, **dict(WEBP=dict(lossless=True), JPEG=dict(quality=98)).get(kind, {}))
    assert image_size(p)==upright[::-1]
    assert np.abs(pixels(p)-expected).max()<=(12 if kind=='JPEG' else 0)
    small = np.asarray(Image.fromarray(expected).reduce(2))
    assert np.abs(pixels(p, 10)-small).max()<=12 and pixels(p, 10).shape==small.shape

@pytest.mark.parametrize('flag', [0, 9, 77])
def test_a_flag_without_meaning_turns_nothing(flag, tmp_path):
    exif = Image.Exif(); exif[0x0112] = flag
    Image.fromarray(smooth(40, 64)).save(tmp_path/'a.jpg', exif=exif)
    assert image_size(tmp_path/'a.jpg')==open_image(tmp_path/'a.jpg').size==(64,40)

def test_damaged_exif_turns_nothing(tmp_path):
    out = io.BytesIO(); exif = Image.Exif(); exif[0x0112] = 6
    Image.fromarray(smooth(40, 64)).save(out, 'JPEG', exif=exif)
    data = out.getvalue(); at = data.index(b'Exif')+6
    (tmp_path/'a.jpg').write_bytes(data[:at]+b'\xee'*8+data[at+8:])
    assert image_size(tmp_path/'a.jpg')==open_image(tmp_path/'a.jpg').size==(64,40)

# ---- broken

@pytest.mark.parametrize('kind', ['JPEG', 'progressive', 'CMYK', 'PNG', 'TIFF', 'LZW', 'GIF', 'BMP', 'WEBP'])
@pytest.mark.parametrize('share', [.02, .3, .7, .95, .995])
def test_truncated_at_many_points(kind, share, tmp_path):
    im = Image.fromarray((smooth(300, 400)//2+noise(300, 400, 3)//2))
    how = dict(progressive=('JPEG', dict(progressive=True)), CMYK=('JPEG', {}), LZW=('TIFF', dict(compression='tiff_lzw'))).get(kind, (kind, {}))
    (im.convert('CMYK') if kind=='CMYK' else im).save(p := tmp_path/'Q7_wd0.jpg', how[0], **how[1])
    data = p.read_bytes()
    assert check_image(p)==''
    p.write_bytes(data[:int(len(data)*share)])
    for side in (None, 20, 64):
        with pytest.raises(OSError, match='Q7_wd0.jpg'): open_image(p, side)
    assert 'Q7_wd0.jpg' in check_image(p)

def test_reserved_but_never_written(tmp_path):
    Image.fromarray(noise(200, 200, 3)).save(p := tmp_path/'a.jpg')
    data = p.read_bytes()
    p.write_bytes(data[:len(data)//2]+bytes(len(data)//2))
    assert 'zeros' in check_image(p)
    p.write_bytes(data+bytes(1000)) # padded behind its end: some cameras do
    assert check_image(p)==''

@pytest.mark.parametrize('data', [b'', b'\xff\xd8\xff', b'<html>404</html>', b'%!PS-Adobe-3.0 EPSF-3.0\n', b'\x89PNG\r\n\x1a\n', b'II*\0\x08\0\0\0\0\0', b'GIF89a', b'BM', b'RIFF\0\0\0\0WEBP'])
def test_what_is_no_image(data, tmp_path):
    (p := tmp_path/'Q7_wd0.jpg').write_bytes(data)
    with pytest.raises(OSError, match='Q7_wd0.jpg'): open_image(p)
    with pytest.raises(OSError, match='Q7_wd0.jpg'): image_size(p)

def test_missing_and_wrong_side(tmp_path):
    with pytest.raises(FileNotFoundError): open_image(tmp_path/'no.jpg')
    with pytest.raises(OSError): open_image(tmp_path)
    Image.new('RGB', (8,8)).save(tmp_path/'a.png')
    for side in (0,-1):
        with pytest.raises(ValueError, match='side'): open_image(tmp_path/'a.png', side)

# ---- reduced scale

@pytest.mark.parametrize('kind', ['JPEG', 'PNG'])
@pytest.mark.parametrize('w,h', [(1000,700), (701,999), (450,447), (448,448), (3001,450), (97,1203)])
def test_reduced_keeps_margin_shape_and_pixels(kind, w, h, tmp_path):
    Image.fromarray(smooth(h, w)).save(tmp_path/'a', kind, **(dict(quality=95) if kind=='JPEG' else {}))
    for side in (16, 50, 224):
        im = open_image(tmp_path/'a', side)
        assert min(im.size)>=min(min(w,h), MARGIN*side)
        assert min(im.size)<2*MARGIN*side or im.size==(w,h) # not much larger than needed
        k = round(max(w,h)/max(im.size))
        assert im.size==tuple(max(1, round(s/k)) for s in (w,h))
        ref = np.asarray(Image.fromarray(smooth(h, w)).resize(im.size, Image.Resampling.BOX)).astype(int)
        assert np.abs(np.asarray(im)-ref).mean()<2

@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'RGBA', 'I;16', 'F', 'CMYK'])
def test_every_mode_can_be_reduced(mode, tmp_path):
    a = smooth(400, 600)
    im = Image.fromarray(a[...,0].astype(np.uint16)*257) if mode=='I;16' else Image.fromarray(a).convert(mode)
    im.save(tmp_path/'a.tif')
    whole,small = pixels(tmp_path/'a.tif'), pixels(tmp_path/'a.tif', 50)
    assert small.shape==(100,150,3) and np.abs(small-whole.reshape(100,4,150,4,3).mean((1,3))).max()<=1

def at_224(im): return v2.functional.resize(v2.functional.pil_to_tensor(im).float(), [224,224], antialias=True).numpy()

def test_real_photographs_at_a_reduced_scale(real, tmp_path):
    "Within a few levels of the whole picture, in color, everywhere."
    files = sorted((real/'large').glob('*.jpg'))
    assert len(files)>=10
    for p in files:
        whole,side = open_image(p), 100
        off = np.abs(at_224(whole)-at_224(open_image(p, 224)))
        assert off.mean()<1 and np.quantile(off, .999)<10
        w,h = image_size(p)
        assert (w,h)==whole.size
        small = v2.functional.resize(v2.functional.pil_to_tensor(open_image(p, side)).float(), [side,side], antialias=True).numpy()
        ref = v2.functional.resize(v2.functional.pil_to_tensor(whole).float(), [side,side], antialias=True).numpy()
        assert np.abs(small-ref).mean()<1 and np.quantile(np.abs(small-ref), .999)<12, p.name

# ---- huge

def peak(code, *args):
    "Largest memory of a fresh process that runs this, in MB; not ru_maxrss, which starts from the memory of the process that started it."
    if not Path('/proc/self/status').is_file(): pytest.skip('memory is read from /proc')
    code = f"import re,sys; from ssl_wikichurches.data.codec import open_image\n{code}\nprint(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    out = subprocess.run([sys.executable, '-W', 'error', '-c', code, *map(str, args)], capture_output=True, text=True)
    assert out.returncode==0, out.stderr
    return int(out.stdout.split()[-1])/1024

def test_150_megapixels_in_little_memory(tmp_path):
    tall_jpeg(tmp_path/'a.jpg', 625)
    assert image_size(tmp_path/'a.jpg')==(15008,10000)
    base = peak('')
    used = peak("im = open_image(sys.argv[1], 224); assert min(im.size)>=448, im.size", tmp_path/'a.jpg')-base
    assert used<80
    assert peak("open_image(sys.argv[1])", tmp_path/'a.jpg')-base>500 # decoded whole it needs 4 bytes a pixel, so this can be measured
    small = pixels(tmp_path/'a.jpg', 224)
    assert np.abs(small[:,:,0].mean(0)-np.linspace(0, 255, small.shape[1])).max()<6 # the gradient runs to the end

def test_150_megapixel_png_in_its_own_memory(tmp_path):
    flat_png(tmp_path/'a.png', 15000, 10000, (200,100,50))
    used = peak("im = open_image(sys.argv[1], 224); assert im.getcolors()==[(im.width*im.height, (200,100,50))]", tmp_path/'a.png')-peak('')
    assert used<700 # 4 bytes a pixel, and nothing of that size beside it

def test_large_tiff_passes_pils_limit_and_leaves_it_alone(tmp_path, monkeypatch):
    Image.fromarray(smooth(300, 400)).save(tmp_path/'a.tif', compression='tiff_lzw')
    Image.fromarray(smooth(300, 400)).save(tmp_path/'b.tif')
    exif = Image.Exif(); exif[0x0112] = 6
    Image.fromarray(smooth(300, 400)).save(tmp_path/'c.tif', exif=exif)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for n in ('a.tif','b.tif'): assert (pixels(tmp_path/n)==smooth(300, 400)).all() and image_size(tmp_path/n)==(400,300)
        assert open_image(tmp_path/'c.tif').size==image_size(tmp_path/'c.tif')==(300,400)
    assert Image.MAX_IMAGE_PIXELS==1000
    with pytest.raises(Image.DecompressionBombError): Image.open(tmp_path/'a.tif')

def test_above_our_limit(tmp_path, monkeypatch):
    flat_png(tmp_path/'a.png', 40, 30, (1,2,3))
    monkeypatch.setattr(codec, 'MAX_PIXELS', 1199)
    for read in (open_image, image_size):
        with pytest.raises(OSError, match='a.png.*40 x 30'): read(tmp_path/'a.png')
    monkeypatch.setattr(codec, 'MAX_PIXELS', 1200)
    assert open_image(tmp_path/'a.png').size==(40,30)

# ---- the dataset

def test_drawn_photographs_come_out_as_they_are(drawn):
    "Bit by bit what a plain decode gives, whatever transform asks; committed results depend on it."
    churches = read_churches(drawn)
    for geometry in ('squash','crop','letterbox'):
        for size in (64, 224):
            for name in churches.images.index[:6]:
                with Image.open(churches.path(name)) as im: plain = v2.functional.to_dtype(v2.functional.pil_to_tensor(im.convert('RGB')), torch.float32, scale=True)
                expected = v2.Compose([eval_transform(size, geometry)])(plain).clamp(0, 1)
                assert torch.equal(ChurchDataset(churches, [name], eval_transform(size, geometry))[0]['image'], expected)

@pytest.mark.parametrize('geometry', ['squash','crop','letterbox'])
@pytest.mark.parametrize('flag', [1, 3, 6, 8])
@pytest.mark.parametrize('kind,w,h', [('JPEG',1203,1601), ('JPEG',1999,807), ('PNG',1203,901)])
def test_paint_lies_under_its_box_at_a_reduced_scale(geometry, flag, kind, w, h, folder):
    churches = read_churches(folder)
    name = churches.boxes.image[0]
    boxes = churches.boxes.iloc[:1].assign(left=.4, top=.375, width=.2, height=.25)
    a = np.zeros((h,w,3), np.uint8); a[round(.375*h):round(.625*h),round(.4*w):round(.6*w)] = 255
    undo = {1:None, 3:'ROTATE_180', 6:'ROTATE_90', 8:'ROTATE_270'}[flag]
    exif = Image.Exif(); exif[0x0112] = flag
    im = Image.fromarray(a)
    (im.transpose(Image.Transpose[undo]) if undo else im).save(churches.path(name), kind, exif=exif, **(dict(quality=95) if kind=='JPEG' else {}))
    churches = replace(churches, boxes=boxes)
    assert min(open_image(churches.path(name), 96).size)<min(w,h)
    item = ChurchDataset(churches, [name], eval_transform(96, geometry))[0]
    seen,mask = item['image'].mean(0)>.51, box_mask(item['boxes'], 96)
    assert ((seen&mask).sum()/(seen|mask).sum()).item()>=.95
    assert boxes_in_view(churches, 96, geometry)==dict(boxes=1, in_view=1, images=1, images_in_view=1)

# ---- prepare

@pytest.fixture
def large(tmp_path):
    "Twelve photographs of half a megapixel and one small one in a folder of the known layout."
    root = tmp_path/'set'; (root/'images').mkdir(parents=True)
    for i in range(12): Image.fromarray(smooth(600, 800+7*i)//2+noise(600, 800+7*i, 3, seed=i)//4).save(root/'images'/f'Q{i+1}_wd0.jpg', quality=85)
    Image.fromarray(smooth(90, 120)).save(root/'images'/'Q13_wd0 Glöckner-塔.png')
    (root/'churches.json').write_text(json.dumps({f'Q{i+1}':dict(styles=['Q46261']) for i in range(13)}))
    (root/'building_parts.json').write_text(json.dumps(dict(meta=[dict(name='Tower', parents=[])], annotations={})))
    (root/'style_names.txt').write_text('Q46261 Romanesque')
    return root

def quiet(root, **how): return prepare(root, **dict(side=128, workers=1, progress=False)|how)
def state(root, side=128): return {p.name:p.read_bytes() for p in (root/f'prepared-{side}').iterdir()}

def test_copies_are_small_upright_and_right(large):
    table = quiet(large)
    assert len(table)==13 and table.made.all() and (table.problem=='').all()
    assert set(state(large))=={*table.index, PREPARED_RECORD}
    for n,t in table.iterrows():
        copy = large/'prepared-128'/n
        assert image_size(copy)==(t.copy_width,t.copy_height) and image_header(copy)['format']=='JPEG' and copy.stat().st_size==t.copy_bytes
        assert min(t.copy_width,t.copy_height)==min(128, min(t.width,t.height)) and image_size(large/'images'/n)==(t.width,t.height)
        whole = open_image(large/'images'/n).resize((64,64), Image.Resampling.BOX)
        assert np.abs(np.asarray(whole).astype(int)-np.asarray(open_image(copy).resize((64,64), Image.Resampling.BOX))).mean()<2.5
    assert '13 photographs: 13 readable (12 JPEG, 1 PNG), 0 unreadable' in prepare_report(table)

def test_second_run_does_nothing_and_changes_are_noticed(large):
    quiet(large); first = state(large)
    times = {p.name:p.stat().st_mtime_ns for p in (large/'prepared-128').glob('Q*')}
    assert not quiet(large).made.any() and state(large)==first
    assert times=={p.name:p.stat().st_mtime_ns for p in (large/'prepared-128').glob('Q*')}
    Image.fromarray(smooth(300, 300)).save(large/'images/Q1_wd0.jpg')
    (large/'prepared-128/Q2_wd0.jpg').unlink()
    (large/'prepared-128/Q3_wd0.jpg').write_bytes(b'short')
    os.utime(large/'images/Q4_wd0.jpg')
    again = quiet(large)
    assert again.index[again.made].tolist()==[f'Q{i}_wd0.jpg' for i in (1,2,3,4)] and again.width['Q1_wd0.jpg']==300

def test_other_settings_make_other_copies(large):
    quiet(large); first = state(large)
    assert quiet(large, quality=60).made.all()
    assert all(len(b)<len(first[n]) for n,b in state(large).items() if n.endswith('.jpg'))
    assert quiet(large, side=64).made.all() and not quiet(large, quality=60).made.any()
    assert list(read_prepared(large))==['prepared-64','prepared-128']
    for wrong in (dict(side=0), dict(quality=0), dict(quality=101), dict(workers=-1)):
        with pytest.raises(ValueError, match='expected'): quiet(large, **wrong)

def test_unreadable_ones_are_listed_counted_and_known_to_the_reader(large, monkeypatch):
    quiet(large)
    p = large/'images/Q5_wd0.jpg'; data = p.read_bytes()
    p.write_bytes(data[:len(data)//2]); (large/'images/Q6_wd0.jpg').write_text('not found')
    table = quiet(large)
    assert table.index[table.problem!=''].tolist()==['Q5_wd0.jpg','Q6_wd0.jpg'] and not (large/'prepared-128/Q5_wd0.jpg').exists()
    report = prepare_report(table)
    assert '2 unreadable' in report and 'Q5_wd0.jpg: cannot decode' in report and 'Q6_wd0.jpg: cannot decode' in report
    assert all(table.problem[n]==check_image(large/'images'/n) for n in table.index)
    def never(path): raise AssertionError(f'{path} was decoded again')
    with monkeypatch.context() as m:
        m.setattr(data_module, 'check_image', never)
        for verify in (True, False): assert read_churches(large, on_error='skip', verify=verify).problems.image.tolist()==['Q5_wd0.jpg','Q6_wd0.jpg']
        with pytest.raises(OSError, match='2 of 13'): read_churches(large)
    p.write_bytes(data) # repaired: the record no longer counts
    assert read_churches(large, on_error='skip').problems.image.tolist()==['Q6_wd0.jpg']
    assert quiet(large).problem['Q5_wd0.jpg']=='' and quiet(large).made.sum()==1

def test_empty_folder_and_no_folder(tmp_path):
    (tmp_path/'images').mkdir()
    table = quiet(tmp_path)
    assert len(table)==0 and prepare_report(table).startswith('0 photographs')
    with pytest.raises(FileNotFoundError, match='images'): quiet(tmp_path/'nowhere')

RUN = "import sys; from ssl_wikichurches.data.prepare import prepare\nif __name__=='__main__': prepare(sys.argv[1], side=128, workers=int(sys.argv[2]), progress=False)"

def start(root, workers=1): return subprocess.Popen([sys.executable, '-c', RUN, str(root), str(workers)])

def test_killed_midway_and_resumed_to_the_same_bytes(large, tmp_path):
    other = shutil.copytree(large, tmp_path/'other')
    quiet(other)
    for n in list((large/'images').iterdir()): # more work, so that the kill falls into it
        for k in range(1,8): os.link(n, n.with_name(n.name.replace('_wd0', f'_wd{k}')))
    process = start(large)
    copies = large/'prepared-128'
    while process.poll() is None and len(list(copies.glob('Q*')) if copies.is_dir() else [])<10: time.sleep(.002)
    process.send_signal(signal.SIGKILL); process.wait()
    done = {p.name for p in copies.glob('Q*')}
    assert 10<=len(done)<104
    for n in done: assert check_image(copies/n)=='' # nothing half
    table = quiet(large)
    assert len(table)==104 and not list(copies.glob('.*'))
    for n,data in state(other).items():
        if n!=PREPARED_RECORD: assert (copies/n).read_bytes()==data

def alive(pid):
    try: return (Path('/proc')/str(pid)/'stat').read_text().rsplit(')', 1)[1].split()[0]!='Z'
    except (FileNotFoundError, ProcessLookupError): return False

@pytest.mark.skipif(not Path('/proc/self/task').is_dir(), reason='finds child processes in /proc')
def test_workers_end_with_a_killed_parent_and_make_the_same(large, tmp_path):
    other = shutil.copytree(large, tmp_path/'other')
    quiet(other)
    for n in list((large/'images').iterdir()):
        for k in range(1,20): os.link(n, n.with_name(n.name.replace('_wd0', f'_wd{k}')))
    process,copies = start(large, 2), large/'prepared-128'
    while process.poll() is None and len(list(copies.glob('Q*')) if copies.is_dir() else [])<3: time.sleep(.005)
    children = (Path('/proc')/str(process.pid)/'task'/str(process.pid)/'children').read_text().split()
    assert process.poll() is None and len(children)>=2
    process.send_signal(signal.SIGKILL); process.wait()
    end = time.monotonic()+10
    while any(map(alive, children)) and time.monotonic()<end: time.sleep(.02)
    assert not any(map(alive, children)) and len(list(copies.glob('Q*')))<260
    table = quiet(large, workers=2)
    assert len(table)==260 and not list(copies.glob('.*'))
    for n,data in state(other).items():
        if n!=PREPARED_RECORD: assert (copies/n).read_bytes()==data

def test_two_processes_at_once(large, tmp_path):
    other = shutil.copytree(large, tmp_path/'other')
    quiet(other)
    assert [p.wait() for p in [start(large), start(large)]]==[0,0]
    assert {n:d for n,d in state(large).items() if n!=PREPARED_RECORD}=={n:d for n,d in state(other).items() if n!=PREPARED_RECORD}
    assert not quiet(large).made.any()

def test_who_reads_the_copies(large):
    quiet(large)
    churches = read_churches(large)
    name,path = 'Q3_wd0.jpg', large/'prepared-128/Q3_wd0.jpg'
    assert churches.prepared_path(name, 64)==path and churches.prepared_path(name, 65)==churches.path(name)
    assert churches.prepared_path('Q13_wd0 Glöckner-塔.png', 500).parent.name=='prepared-128' # all of its pixels
    data = path.read_bytes()
    Image.new('RGB', image_size(path), 'red').save(path)
    assert churches.prepared_path(name, 64)==churches.path(name) # another file than the record says
    path.write_bytes(data); assert churches.prepared_path(name, 64)==path
    red = Image.new('RGB', image_size(path), 'red'); red.save(path); b = path.read_bytes()
    record = json.loads((large/'prepared-128'/PREPARED_RECORD).read_text()); record['photographs'][name]['copy_bytes'] = len(b)
    (large/'prepared-128'/PREPARED_RECORD).write_text(json.dumps(record))
    churches = read_churches(large)
    image = lambda prepared, tfm: ChurchDataset(churches, [name], tfm, prepared=prepared)[0]['image']
    assert image(True, eval_transform(64))[1].max()<.05 # the red copy
    assert image(False, eval_transform(64))[1].max()>.3 # a measurement sees the photograph
    assert image(True, eval_transform(96))[1].max()>.3 # the copy is too small for this
    os.utime(churches.path(name))
    assert image(True, eval_transform(64))[1].max()>.3 # and stale now

def test_a_copy_shows_what_its_photograph_shows(large):
    quiet(large)
    churches = read_churches(large)
    for n in churches.images.index:
        a,b = (ChurchDataset(churches, [n], eval_transform(64), prepared=p)[0]['image']*255 for p in (False,True))
        assert (a-b).abs().mean()<1.5

@pytest.mark.parametrize('change', [lambda d: d.clear(), lambda d: d.update(photographs=[]), lambda d: d['settings'].update(side='x'),
                                    lambda d: d['photographs'].update({'Q1_wd0.jpg':dict(problem='')}), lambda d: d['photographs']['Q1_wd0.jpg'].update(copy_width=None)])
def test_damaged_record_is_named(large, change):
    quiet(large)
    path = large/'prepared-128'/PREPARED_RECORD
    d = json.loads(path.read_text()); change(d); path.write_text(json.dumps(d))
    with pytest.raises(ValueError, match='prepared.json.*deleted'): read_churches(large)
    path.write_text('{')
    with pytest.raises(ValueError, match='prepared.json.*deleted'): read_churches(large)
    path.unlink()
    assert quiet(large).made.all()
