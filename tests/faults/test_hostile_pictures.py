"Hostile pictures: the same for PNG and JPG, and formats that start other programs."
import struct
import zlib

import pytest
from PIL import Image, PngImagePlugin

from faults.build import gz, nifti, png, png_chunk, png_of, write
from faults.harness import NAME, Table, judge, read_image

hostile = Table()
BOMB = zlib.compress(bytes(2**28), 9)  # 256 MiB in 256 kB


@hostile(read_image, reads=lambda v: v['shape'] == [12, 9, 1])
def unhurt_png(here): return write(here/'a.png', png())

@hostile(read_image, reads=lambda v: v['shape'] == [12, 9, 1])
def unhurt_jpg(here): return write(here/'a.jpg', png(format='JPEG'))

@hostile(read_image, 'empty')
def empty_png(here): return write(here/'a.png', b'')

@hostile(read_image, 'empty')
def empty_jpg(here): return write(here/'a.jpg', b'')

@hostile(read_image)
def png_cut_in_half(here):
    raw = png(size=(64, 64))
    return write(here/'a.png', raw[:len(raw)//2])

@hostile(read_image)
def png_signature_alone(here): return write(here/'a.png', png()[:8])

@hostile(read_image)
def jpg_cut_in_half(here):
    raw = png(size=(200, 200), format='JPEG')
    return write(here/'a.jpg', raw[:len(raw)//2])

@hostile(read_image)
def png_with_a_wrong_checksum(here):
    raw = bytearray(png())
    raw[29] ^= 255
    return write(here/'a.png', raw)

@hostile(read_image)
def png_without_pixels(here): return write(here/'a.png', png_of(12, 9, b''))

@hostile(read_image, reads='either')  # a whole stream of too few rows: PIL leaves the rest black, without a word
def png_with_too_few_pixels(here): return write(here/'a.png', png_of(64, 64, zlib.compress(bytes(65*3))))

@hostile(read_image)
def png_of_no_width(here): return write(here/'a.png', png_of(0, 9, zlib.compress(b'')))

@hostile(read_image)
def text_named_png(here): return write(here/'a.png', b'DOE^JANE;MRN-4711\n'*20)

@hostile(read_image)
def volume_named_png(here): return write(here/'a.png', nifti())

@hostile(read_image)
def gzip_named_jpg(here): return write(here/'a.jpg', gz(nifti()))

@hostile(read_image, 'bomb|pixels', mb=100)
def png_that_declares_three_gigapixels(here): return write(here/'a.png', png_of(60000, 60000, zlib.compress(bytes(60001))))

@hostile(read_image, 'bomb|pixels', mb=100)
def png_bomb_that_holds_what_it_declares(here):
    pack = zlib.compressobj(9)
    body = b''.join(pack.compress(bytes(20001*500)) for _ in range(40)) + pack.flush()
    return write(here/'a.png', png_of(20000, 20000, body))

@hostile(read_image, mb=100, reads='either')
def png_with_a_bomb_in_its_text(here):
    bomb = PngImagePlugin.PngInfo()
    bomb.add(b'zTXt', b'Comment\0\0' + BOMB)
    return write(here/'a.png', png(pnginfo=bomb))

@hostile(read_image, mb=100, reads='either')
def png_with_a_bomb_for_a_colour_profile(here):
    raw = png()
    return write(here/'a.png', raw[:33] + png_chunk(b'iCCP', b'x\0\0' + BOMB) + raw[33:])

@hostile(read_image, reads='either')
def png_with_an_identity_in_its_text(here):
    text = PngImagePlugin.PngInfo()
    text.add_text('Patient', NAME)
    return write(here/'a.png', png(pnginfo=text))

@hostile(read_image, reads='either')
def jpg_with_a_damaged_exif(here):
    exif = b'Exif\0\0MM\0*' + struct.pack('>IH', 8, 500) + b'\x01\x12\0\3' + b'\xff'*60
    return write(here/'a.jpg', png(format='JPEG', exif=exif))

@hostile(read_image, reads='either')
def postscript_that_wants_to_be_run(here):
    "PIL hands such a file to ghostscript; a stand-in of that name would leave its mark."
    for name in ('gs', 'gswin32c', 'gswin64c'):
        write(here.parent/'bin'/name, f'#!/bin/sh\necho run > {here.parent}/ghostscript_was_run\n'.encode()).chmod(0o755)
    return write(here/'a.png', b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n')

def other(fmt, name):
    def build(here):
        Image.new('L', (8, 8), 7).save(here/'b.tmp', format=fmt)
        return (here/'b.tmp').rename(here/name)
    build.__name__ = f'{fmt.lower()}_named_{name.rpartition(".")[2]}'
    return build

for fmt, name in (('TIFF', 'a.png'), ('GIF', 'a.png'), ('BMP', 'a.jpg'), ('PDF', 'a.png')):
    hostile(read_image, reads='either')(other(fmt, name))


@pytest.mark.parametrize('case', hostile, ids=lambda c: c.name)
def test_picture(case, ground): judge(case, ground)
