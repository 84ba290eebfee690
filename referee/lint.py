"""What the edited file must not do: a table of rules over its syntax tree.

Every import, call, change and use of a name becomes a line of text in which an imported name is written out behind an @:
`import threading`, `call @os.fork()`, `set @torch.nn.functional.cross_entropy`. In one process nothing stops a determined
cheat; this tells one who drifts into it. The file reads no file, by whatever call: what a run learns comes from the
loader's batches. It may write what a human wants to keep.
"""

import ast
import re

PROCESSES = "threading|_thread|multiprocessing|concurrent|subprocess|asyncio|pty|joblib|signal"
MEMORY = "ctypes|atexit|unittest|mock|faulthandler|builtins|code|gc.get_.*|site|sys.modules"
FILES = (
    "mmap|io|codecs|linecache|fileinput|tokenize|pickle|dill|shelve|sqlite3|zipfile|tarfile|gzip|bz2|lzma|pkgutil|csv|glob"
    "|pandas|datasets|safetensors|h5py|pyarrow|urllib|requests|http|socket|ssl|httpx|aiohttp|huggingface_hub"
    "|importlib.resources|importlib.metadata"
)
READS = (
    "read_text|read_bytes|read_parquet|memory_map|memmap|open_memmap|fromfile|from_file|loadtxt|genfromtxt|load_file"
    "|getsource|getsourcelines|findsource|get_data|urlopen|load_state_dict_from_url"
)
FRAMES = (
    "_getframe|_current_frames|f_back|f_locals|f_globals|gi_frame|tb_frame|__globals__|__code__|__closure__|__builtins__"
    "|__loader__|__import__|get_referrers|get_objects|get_referents|settrace|setprofile|addaudithook|import_module"
    "|redirect_stdout|redirect_stderr"
)
VARIABLES = r"(SEED|TIME_BUDGET|AUDIT|AUTORESEARCH_\w*|HOME|TMPDIR|USER|CUDA_VISIBLE_DEVICES|GIT_\w*)"
NO_FILE = "an experiment reads nothing but the loader's batches"
NO_PROCESS = "no threads, processes or signal handlers of its own"
BEYOND = "reaches beyond its own code"

RULES = (  # (pattern of a whole line, what is said of it, empty where it is free); the first that fits counts
    (rf"import (.*\.)?({PROCESSES})(\..*)?", NO_PROCESS),
    (rf"use @(torch|numpy|os)\.(.*\.)?({PROCESSES})\b.*", NO_PROCESS),
    (r"call @(.*\.)?os\.(fork|system|popen|exec|spawn|posix_spawn|_exit|kill|dup).*", NO_PROCESS),
    (r"call .*\bnum_workers=(?!0\b).*", NO_PROCESS),
    (rf"import ({MEMORY})(\..*)?", BEYOND),
    (rf"(use|import) (.*\.)?({FRAMES})", BEYOND),
    (r"(use|set) @(.*\.)?sys\.(modules|meta_path|path_hooks)\b.*", BEYOND),
    (r"set @sys\..*", BEYOND),
    (r"call @inspect\.(stack|currentframe|getmembers|trace|getouterframes|getinnerframes).*", BEYOND),
    (r"call (exec|eval|compile|globals|__import__|breakpoint|input)\(.*", "what runs is not what is written"),
    (r"import referee(\..*)?", "prepare is the door"),
    (rf"import ({FILES})(\..*)?", NO_FILE),
    (r"read .*", NO_FILE),
    (r"call @os\.(read|listdir|scandir|walk|pread|fdopen|sendfile).*", NO_FILE),
    (rf"call (.*\.)?({READS})\(.*", NO_FILE),
    (r"call @(torch|numpy|json|marshal)\.(.*\.)?load\w*\(.*", NO_FILE),
    (
        r"(use|import|class) (.*\.)?(\w*Torch(Function|Dispatch)Mode|_python_dispatch)\b.*",
        "sees every operation of torch",
    ),
    (r"def __torch_(function|dispatch)__", "sees every operation of torch"),
    (rf"variable {VARIABLES}", "is a variable of the harness"),
    (r"(set|call) @os\.environ\b.*", ""),
    (r"set @.*\b(config|backends)\b.*", ""),
    (r"set @torch\.nn\.(?!Module\b|Parameter\b)(modules\.\w+\.)?[A-Z]\w*\.(?!__)\w+", ""),
    (r"set (vars\(|type\()*@.*", "changes what is not its own"),
    (r"call @.*__dict__\.(update|setdefault|pop|clear)\(.*", "changes what is not its own"),
    (r"door .*", "is outside the door of the frozen half"),
)


class Names(ast.NodeTransformer):
    """Writes imported names out, and getattr with a constant as the attribute that it is."""

    def __init__(self):
        self.scopes = [{}]  # of each open function, innermost last: {name: what it was imported as, None for its own}

    def bind(self, name, meaning=None):
        self.scopes[-1][name] = meaning

    def visit_Import(self, node):
        for name in node.names:
            self.bind(name.asname or name.name.split(".")[0], name.name if name.asname else name.name.split(".")[0])
        return node

    def visit_ImportFrom(self, node):
        for name in node.names:
            self.bind(name.asname or name.name, f"{node.module}.{name.name}")
        return node

    def visit_Name(self, node):
        if isinstance(node.ctx, ast.Store):
            self.bind(node.id)
        meaning = next((scope[node.id] for scope in reversed(self.scopes) if node.id in scope), None)
        written = ast.Name(f"@{meaning}" if meaning else node.id, node.ctx)
        return ast.copy_location(written, node)

    def visit_Call(self, node):
        self.generic_visit(node)
        named = isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) > 1
        if named and isinstance(node.args[1], ast.Constant) and str(node.args[1].value).isidentifier():
            return ast.copy_location(ast.Attribute(node.args[0], node.args[1].value, ast.Load()), node)
        return node

    def visit_Assign(self, node):
        node.value = self.visit(node.value)
        alias = ast.unparse(node.value) if isinstance(node.value, (ast.Name, ast.Attribute)) else ""
        for target in node.targets:
            if isinstance(target, ast.Name):
                self.bind(target.id, alias[1:] if alias.startswith("@") else None)
        node.targets = [target if isinstance(target, ast.Name) else self.visit(target) for target in node.targets]
        return node

    def visit_FunctionDef(self, node):
        """Also a lambda, a comprehension: names bound in it are its own, whatever they mean outside."""
        inner = list(ast.walk(node))
        own = {each.arg for each in inner if isinstance(each, ast.arg)}
        own |= {each.id for each in inner if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}
        for each in inner:
            if isinstance(each, (ast.Global, ast.Nonlocal)):
                own -= set(each.names)
        self.scopes.append(dict.fromkeys(own))
        self.generic_visit(node)
        self.scopes.pop()
        return node

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef
    visit_ListComp = visit_SetComp = visit_FunctionDef
    visit_DictComp = visit_GeneratorExp = visit_FunctionDef


def lines_of(tree, doors):
    """(line number, text) of everything that a rule might speak of. doors: {frozen module: names that may be used}."""
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            above = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for name in node.names:
                yield node.lineno, f"import {above}{name.name}"
                yield from door(f"{above}{name.name}", doors, node.lineno)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.lineno, f"def {node.name}"
        elif isinstance(node, ast.ClassDef):
            yield from ((node.lineno, f"class {ast.unparse(base)}") for base in node.bases)
        elif isinstance(node, ast.Call):
            yield node.lineno, f"call {ast.unparse(node)}"
            yield from deeds_of_call(node, strings)
        elif isinstance(node, (ast.Name, ast.Attribute, ast.Subscript)):
            text = ast.unparse(node)
            yield node.lineno, f"{'use' if isinstance(node.ctx, ast.Load) else 'set'} {text}"
            if text.startswith("@") and id(node) not in inner:
                yield from door(text[1:] if "." in text else f"{text[1:]}.*", doors, node.lineno)
            if (
                isinstance(node, ast.Subscript)
                and not isinstance(node.ctx, ast.Load)
                and text.startswith("@os.environ")
            ):
                yield from variables([node.slice], strings, node.lineno)


def door(path, doors, number):
    """A line for a name of a frozen module that is outside its door, or for the module itself, handed on."""
    module, _, name = path.partition(".")
    if module in doors and name and re.match(r"[\w*]*", name)[0] not in doors[module]:
        yield number, f"door {path}"


def deeds_of_call(node, strings):
    """Lines for a file that is opened to be read, an attribute set by setattr, environment variables."""
    called = ast.unparse(node.func)
    if re.fullmatch(r"open|@.*\bopen|\w+\.open", called):
        given = [word.value for word in node.keywords if word.arg in ("mode", "flags")]
        of_module = called == "open" or re.fullmatch(r"@[\w.]+", called)
        given += node.args[1 if of_module else 0 :][:1]
        mode = ast.unparse(given[0]) if given else "'r'"
        if "+" in mode or not re.fullmatch(r"'[wax]\w*'|.*O_WRONLY.*", mode):
            yield node.lineno, f"read {ast.unparse(node)}"
    if called in ("setattr", "delattr") and len(node.args) > 1:
        name = node.args[1].value if isinstance(node.args[1], ast.Constant) else "?"
        yield node.lineno, f"set {ast.unparse(node.args[0])}.{name}"
    if re.fullmatch(r"@os\.(environ\.(update|setdefault|pop)|putenv|unsetenv)", called):
        names = [ast.Constant(word.arg) for word in node.keywords]
        for argument in node.args[:1]:
            names += argument.keys if isinstance(argument, ast.Dict) else [argument]
        yield from variables(names, strings, node.lineno)


def variables(names, strings, number):
    """Lines for environment variables that are set. One with a computed name may be any that the file mentions."""
    for name in names:
        known = [name.value] if isinstance(name, ast.Constant) else sorted(strings)
        for text in known:
            yield number, f"variable {text}"


def lint(source, doors=None):
    """[(line, sentence)] for what a file does to the harness, oldest line first; empty for a file that is no Python."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    found = set()
    for number, text in lines_of(Names().visit(tree), doors or {}):
        sentence = next((said for pattern, said in RULES if re.fullmatch(pattern, text, re.DOTALL)), "")
        if sentence:
            found.add((number, f"{text[:80]}: {sentence}"))
    return sorted(found)
