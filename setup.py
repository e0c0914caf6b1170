"Reads every fact about the package from settings.ini."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
dev = cfg['dev_requirements'].split()
extras = {name:packages.split(',') for name,packages in (e.split('=', 1) for e in cfg['extras'].split())}

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], keywords=cfg['keywords'],
    license='Apache-2.0', python_requires=f">={cfg['min_python']}",
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=find_packages(include=['ssl_wikichurches*']), package_data={'ssl_wikichurches': ['weights/*/*', 'templates/*']}, zip_safe=False,
    install_requires=cfg['requirements'].split(), extras_require={'dev': dev, **extras},
    entry_points={'console_scripts': cfg['console_scripts'].split(),
                  'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
)
