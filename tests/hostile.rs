//! Files that no writer made, and the sentence that refuses each: containers of other kinds, forged headers, and
//! every other form of a file that has a right one.

mod common;

use std::collections::HashSet;

use common::{CHECKSUM_AT, floats, forged, refusal, seal, unsealed, with_header, with_metadata};
use roptim::checkpoint::{Tree, from_bytes, to_bytes};

/// A file and the sentence that refuses it, without the `checkpoint: ` that starts all of them. One that ends in
/// `at …` goes on with the line and the column at which the JSON reader stopped.
type Case = (Vec<u8>, String);

fn case(file: impl Into<Vec<u8>>, sentence: impl Into<String>) -> Case {
    (file.into(), sentence.into())
}

/// A file that means the same as another one, or nearly, and is not written like it. The right one is read, so that
/// nothing but the form is wrong.
fn another_form(wrong: Vec<u8>, right: Vec<u8>) -> Case {
    from_bytes(&right).unwrap();
    // The lengths and the checksums may differ as well.
    let same = |at: usize| wrong[at] == right[at] || CHECKSUM_AT.contains(&at);
    let at = (8..right.len()).find(|&at| !same(at)).unwrap();
    case(wrong, format!("the header must be in canonical form, got another form at byte {at} of the file"))
}

/// A tensor of one float32.
const A: &str = r#""a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
/// The tree that has it.
const TREE_A: &str = r#"{"a":{"$tensor":"a"}}"#;

/// A file whose tree has the tensor `a` and whose header has this entry for it.
fn entry(text: &str) -> Vec<u8> {
    forged(TREE_A, text, &[0; 4])
}

/// A file of this tree and no tensors.
fn of_tree(tree: &str) -> Vec<u8> {
    forged(tree, "", &[])
}

/// A tensor's entry.
fn listed(name: &str, dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
}

/// A valid file with another header length.
fn with_length(file: &[u8], len: u64) -> Vec<u8> {
    let mut file = file.to_vec();
    file[..8].copy_from_slice(&len.to_le_bytes());
    seal(&mut file);
    file
}

fn header_len(file: &[u8]) -> u64 {
    u64::from_le_bytes(file[..8].try_into().unwrap())
}

fn foreign_files() -> Vec<Case> {
    let kinds: &[(&[u8], &str)] = &[
        (b"PK\x03\x04", "a zip archive, as torch.save and numpy.savez write"),
        (b"PK\x03\x04\x14\0\0\0\x08\0archive/data.pkl", "a zip archive, as torch.save and numpy.savez write"),
        (b"PK\x05\x06\0\0\0\0\0\0\0\0\0\0\0\0", "a zip archive, as torch.save and numpy.savez write"),
        (b"\x93NUMPY\x01\0v\0{'descr': '<f8'", "an array file of numpy.save"),
        (b"\x93NUMPY\x02\0v\0\0\0{'descr': '|O'", "an array file of numpy.save"),
        (b"\x80\x02}q\0X\x01\0\0\0aq\x01K\x01s.", "a pickle"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "a pickle"),
        (b"\x80\x02cposix\nsystem\nq\0X\x02\0\0\0idq\x01\x85q\x02R.", "a pickle"),
        (b"\x80\x03]q\0(K\x01K\x02e.", "a pickle"),
        (b"\x80\x03(K\x01K\x02tq\0.", "a pickle"),
        (b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x05posix\x94", "a pickle"),
        (b"\x80\x05\x95\x10\0\0\0\0\0\0\0\x8c\x08builtins", "a pickle"),
        (b"\x89HDF\r\n\x1a\n\0\0\0\0\0\x08\x08\0", "an HDF5 file"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\x03", "a gzip file"),
        (b"{\"epoch\": 3}", "a text file"),
        (b"{\r\n\t\"a\": 1}", "a text file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a text file"),
        (b"<!DOCTYPE html>", "a text file"),
        (b"cposix\nsystem\n(S'id'\ntR.", "a text file"),
    ];
    kinds
        .iter()
        .map(|(bytes, kind)| case(*bytes, format!("the file must be one that roptim wrote, got {kind}")))
        .collect()
}

fn header_lengths() -> Vec<Case> {
    let too_long = |n: u64| case(n.to_le_bytes(), format!("the header's length must be at most 16777216, got {n}"));
    let too_short = |n: usize| case(vec![0; n], format!("the file must be at least 8 bytes long, got {n}"));
    let beyond = |n: u64, held: usize| {
        let file = [n.to_le_bytes().to_vec(), vec![b' '; held]].concat();
        let allowed = format!("at most the {held} bytes that follow it");
        case(file, format!("the header's length must be {allowed}, got {n}"))
    };
    let valid = to_bytes(&Tree::Int(1)).unwrap();
    let len = header_len(&valid);
    let mut cases = vec![
        too_short(0),
        too_short(1),
        too_short(7),
        too_long(u64::MAX),
        too_long(1 << 63),
        too_long((1 << 63) - 1),
        too_long(1 << 32),
        too_long((16 << 20) + 1),
        // The start of an image, as an example of a file of a kind that has no name here.
        case(b"\x89PNG\r\n\x1a\n", "the header's length must be at most 16777216, got 727905341920923785"),
        beyond(1, 0),
        beyond(100, 99),
        beyond(16 << 20, 0),
        beyond(16 << 20, 500),
        case([0; 8], "the header must be strict JSON, got EOF while parsing a value at …"),
        // The length of a header that ends elsewhere.
        case(with_length(&valid, len - 1), "the data must be 0 bytes long, got 1, with trailing bytes"),
        case(with_length(&valid, 40), "the header must be strict JSON, got EOF while parsing a string at …"),
        case(with_length(&valid, 1), "the header must be strict JSON, got EOF while parsing an object at …"),
        case(
            with_length(&valid, len + 1),
            format!("the header's length must be at most the {len} bytes that follow it, got {}", len + 1),
        ),
        case(
            with_length(&valid, u64::from_be(len)),
            format!("the header's length must be at most 16777216, got {}", u64::from_be(len)),
        ),
    ];
    // Data that the length makes part of the header.
    let mut file = entry(A);
    let swallowed = header_len(&file) + 4;
    cases.push(case(with_length(&file, swallowed), "the header must be strict JSON, got trailing characters at …"));
    let end = file.len();
    file[end - 4..].fill(0xff);
    let got = format!("invalid utf-8 sequence of 1 bytes from index {}", swallowed - 4);
    cases.push(case(with_length(&file, swallowed), format!("the header must be UTF-8, got {got}")));
    cases
}

/// The header, where it is no JSON.
fn json() -> Vec<Case> {
    let broken: &[(&str, &str)] = &[
        ("{", "EOF while parsing an object"),
        (r#"{"a""#, "EOF while parsing an object"),
        (r#"{"a":"#, "EOF while parsing a value"),
        (r#"{"a":1"#, "EOF while parsing an object"),
        (r#"{"a":1,"#, "EOF while parsing a value"),
        (r#"{"a":1,}"#, "trailing comma"),
        ("{,}", "key must be a string"),
        (r#"{"a" 1}"#, "expected `:`"),
        ("{a:1}", "key must be a string"),
        ("{'a':1}", "key must be a string"),
        ("{1:1}", "key must be a string"),
        ("{null:1}", "key must be a string"),
        ("{} x", "trailing characters"),
        ("{}{}", "trailing characters"),
        ("{}\0", "trailing characters"),
        ("{}]", "trailing characters"),
        ("\u{feff}{}", "expected value"),
        ("nul", "expected ident"),
        ("nan", "expected ident"),
        ("NaN", "expected value"),
        ("Infinity", "expected value"),
        ("-Infinity", "invalid number"),
        ("True", "expected value"),
        ("None", "expected value"),
        ("-", "invalid number"),
        ("01", "invalid number"),
        ("-01", "invalid number"),
        ("+1", "expected value"),
        (".5", "expected value"),
        ("1.", "invalid number"),
        ("1e", "invalid number"),
        ("1_000", "trailing characters"),
        ("0x10", "trailing characters"),
        ("1e999", "number out of range"),
        ("-1e999", "number out of range"),
        (r#""abc"#, "EOF while parsing a string"),
        (r#""\x""#, "invalid escape"),
        (r#""\u12""#, "invalid escape"),
        (r#""\u{61}""#, "invalid escape"),
        (r#""\ud800""#, "unexpected end of hex escape"),
        (r#""\ud800\n""#, "unexpected end of hex escape"),
        (r#""\ud800\u0041""#, "lone leading surrogate in hex escape"),
        (r#""\udc00""#, "lone leading surrogate in hex escape"),
        ("\"\t\"", "control character (\\u0000-\\u001F) found while parsing a string"),
        ("\"\0\"", "control character (\\u0000-\\u001F) found while parsing a string"),
        ("// {}", "expected value"),
        ("/**/{}", "expected value"),
        ("[1,]", "trailing comma"),
        ("[1 2]", "expected `,` or `]`"),
        ("[1}", "expected `,` or `]`"),
        (r#"{"a":1]"#, "expected `,` or `}`"),
        (r#"{"a":1,"a":1}"#, "the key \"a\" twice"),
        (r#"{"a":1,"\u0061":1}"#, "the key \"a\" twice"),
        (r#"{"":1,"":1}"#, "the key \"\" twice"),
        (r#"{"a":[[{"b":1,"b":1}]]}"#, "the key \"b\" twice"),
        (r#"{"__metadata__":{},"__metadata__":{}}"#, "the key \"__metadata__\" twice"),
        (r#"{"__metadata__":{},"\u005f_metadata__":{}}"#, "the key \"__metadata__\" twice"),
        (r#"{"__metadata__":{"roptim":"","roptim":""}}"#, "the key \"roptim\" twice"),
        (r#"{"__metadata__":{"roptim":"","\u0072optim":""}}"#, "the key \"roptim\" twice"),
    ];
    let mut cases: Vec<_> = broken
        .iter()
        .map(|(text, got)| case(with_header(text, &[]), format!("the header must be strict JSON, got {got} at …")))
        .collect();
    let deep = [
        "[".repeat(1000),
        r#"{"a":"#.repeat(1000),
        r#"[{"a":"#.repeat(1000),
        // Nearly all that the length allows.
        "[".repeat((16 << 20) - 64),
        format!("{}{}", "[".repeat(128), "]".repeat(128)),
    ];
    let sentence = "the header must be strict JSON, got recursion limit exceeded at …";
    cases.extend(deep.iter().map(|text| case(with_header(text, &[]), sentence)));
    let values = [
        ("null", "null"),
        ("true", "true"),
        ("-1", "-1"),
        ("18446744073709551615", "18446744073709551615"),
        ("1.5", "1.5"),
        ("-0", "-0.0"),
        ("[]", "a list of 0"),
        (r#"[{"__metadata__":{}}]"#, "a list of 1"),
        (r#""\u0000""#, r#""\0""#),
    ];
    cases.extend(
        values.map(|(text, got)| case(with_header(text, &[]), format!("the header must be an object, got {got}"))),
    );
    let long = format!("{:?}", "x".repeat(1000));
    cases.push(case(with_header(long, &[]), format!("the header must be an object, got \"{}\"…", "x".repeat(60))));
    cases
}

fn utf8() -> Vec<Case> {
    // Where the string's content starts, and how many bytes are wrong there.
    let wrong: &[(&[u8], usize)] = &[
        (b"\xff", 1),
        (b"\xfe\xff", 1),
        (b"\x80", 1),
        // Overlong forms of "/" and of NUL.
        (b"\xc0\xaf", 1),
        (b"\xc0\x80", 1),
        (b"\xe0\x80\xaf", 1),
        (b"\xf0\x80\x80\xaf", 1),
        // A surrogate, and a pair of them.
        (b"\xed\xa0\x80", 1),
        (b"\xed\xa0\xbd\xed\xb8\x80", 1),
        // Above U+10FFFF, and longer than any character.
        (b"\xf4\x90\x80\x80", 1),
        (b"\xf8\x88\x80\x80\x80", 1),
        // Cut off.
        (b"\xe2\x82", 2),
        (b"\xf0\x9f\x98", 3),
    ];
    let refused = |(bytes, count): &(&[u8], usize)| {
        let got = format!("invalid utf-8 sequence of {count} bytes from index 2");
        case(with_header([b"{\"", *bytes, b"\":1}"].concat(), &[]), format!("the header must be UTF-8, got {got}"))
    };
    let mut cases: Vec<_> = wrong.iter().map(refused).collect();
    let utf16: Vec<u8> = "\u{feff}{}".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let got = "invalid utf-8 sequence of 1 bytes from index 0";
    cases.push(case(with_header(utf16, &[]), format!("the header must be UTF-8, got {got}")));
    cases
}

fn metadata() -> Vec<Case> {
    let nobody = "the file must be one that roptim wrote, got a safetensors file without metadata";
    let somebody = "the file must be one that roptim wrote, got a safetensors file without the metadata of roptim";
    let mut cases = vec![
        case(with_header("{}", &[]), nobody),
        case(with_header(format!("{{{A}}}"), &[0; 4]), nobody),
        case(with_header(r#"{"__Metadata__":{"roptim":""}}"#, &[]), nobody),
        case(with_header(r#"{"__metadata__":{}}"#, &[]), somebody),
        case(with_header(r#"{"__metadata__":{"format":"pt"}}"#, &[]), somebody),
        case(with_header(r#"{"__metadata__":{"format":"np","Roptim":"{}"}}"#, &[]), somebody),
        case(
            with_header(format!(r#"{{{A},"__metadata__":{{}}}}"#), &[0; 4]),
            "__metadata__ must be the header's first key, got key 1",
        ),
    ];
    for (text, got) in [("null", "null"), ("1", "1"), ("\"\"", "\"\""), ("[]", "a list of 0")] {
        let file = with_header(format!(r#"{{"__metadata__":{text}}}"#), &[]);
        cases.push(case(file, format!("__metadata__ must be an object, got {got}")));
    }
    for (text, got) in [("null", "null"), ("1e0", "1.0"), ("{}", "an object"), ("[1,2]", "a list of 2")] {
        let file = with_header(format!(r#"{{"__metadata__":{{"roptim":{text}}}}}"#), &[]);
        cases.push(case(file, format!("__metadata__.roptim must be a string, got {got}")));
    }
    let broken = [
        ("", "EOF while parsing a value"),
        ("{", "EOF while parsing an object"),
        ("{\"format\":1,}", "trailing comma"),
        ("{}}", "trailing characters"),
        ("\u{feff}{}", "expected value"),
        ("{\"format\":1,\"format\":1}", "the key \"format\" twice"),
        ("{\"format\":1,\"form\\u0061t\":2}", "the key \"format\" twice"),
        ("{\"checksum\":\"\",\"checksum\":\"\"}", "the key \"checksum\" twice"),
        ("{\"tree\":1,\"tree\":1}", "the key \"tree\" twice"),
    ];
    for (text, got) in broken {
        let sentence = format!("__metadata__.roptim must be strict JSON, got {got} at …");
        cases.push(case(with_metadata(text, "", &[]), sentence));
    }
    for (text, got) in [("[]", "a list of 0"), ("1", "1"), ("\"{}\"", "\"{}\"")] {
        cases.push(case(with_metadata(text, "", &[]), format!("__metadata__.roptim must be an object, got {got}")));
    }
    let zeros = "0".repeat(CHECKSUM_AT.len());
    let valid = format!(r#"{{"format":1,"checksum":"{zeros}","tree":1}}"#);
    for (key, more) in [("b", ",\"b\":\"\""), ("", ",\"\":1"), ("ROPTIM", ",\"ROPTIM\":\"\"")] {
        let text = serde_json::to_string(&valid).unwrap();
        let file = with_header(format!(r#"{{"__metadata__":{{"roptim":{text}{more}}}}}"#), &[]);
        cases.push(case(file, format!("__metadata__ must be of the one key \"roptim\", got {key:?}")));
    }
    for key in ["x", "Tree", "", "$tree"] {
        let text = valid.replace('}', &format!(",{key:?}:1}}"));
        let sentence = format!("a key of __metadata__.roptim must be format, checksum or tree, got {key:?}");
        cases.push(case(with_metadata(&text, "", &[]), sentence));
    }
    let missing = [
        ("{}".to_owned(), "the format version must be present, got none"),
        (r#"{"format":1,"tree":1}"#.to_owned(), "the checksum must be present, got none"),
        (format!(r#"{{"format":1,"checksum":"{zeros}"}}"#), "the tree must be present, got none"),
    ];
    cases.extend(missing.map(|(text, sentence)| case(with_metadata(&text, "", &[]), sentence)));
    cases
}

fn versions() -> Vec<Case> {
    let wrong = [
        ("\"1\"", "\"1\""),
        ("null", "null"),
        ("true", "true"),
        ("[1]", "a list of 1"),
        ("{}", "an object"),
        ("0", "0"),
        ("-1", "-1"),
        ("-9223372036854775808", "-9223372036854775808"),
        ("1.0", "1.0"),
        ("1e0", "1.0"),
        ("2.5", "2.5"),
        ("18446744073709551616", "1.8446744073709552e19"),
    ];
    let mut cases: Vec<_> = wrong
        .iter()
        .map(|(text, got)| {
            let file = with_metadata(&format!(r#"{{"format":{text},"checksum":"","tree":1}}"#), "", &[]);
            case(file, format!("the format version must be 1, got {got}"))
        })
        .collect();
    let later = |version: &str| {
        let remedy = "a later roptim wrote the file, install that one to read it";
        format!("the format version must be at most 1, got {version}; {remedy}")
    };
    for version in ["2", "256", "4294967297", "9223372036854775807", "9223372036854775808", "18446744073709551615"] {
        cases.push(case(with_metadata(&format!(r#"{{"format":{version}}}"#), "", &[]), later(version)));
    }
    // What a later version may have beside is not looked at before the version.
    cases.push(case(with_metadata(r#"{"news":[],"format":2,"checksum":1}"#, "", &[]), later("2")));
    cases.push(case(with_header(r#"{"__metadata__":{"more":1,"roptim":"{\"format\":3}"}}"#, &[]), later("3")));
    cases.push(case(with_header(r#"{"__metadata__":{"roptim":"{\"format\":4}"},"a":1}"#, &[]), later("4")));
    cases
}

fn checksums() -> Vec<Case> {
    let with_checksum = |value: &str| {
        let text = serde_json::to_string(&format!(r#"{{"format":1,"checksum":{value},"tree":1}}"#)).unwrap();
        unsealed(format!(r#"{{"__metadata__":{{"roptim":{text}}}}}"#), &[])
    };
    let mut cases = Vec::new();
    for (value, got) in [("null", "null"), ("0", "0"), ("true", "true"), ("[]", "a list of 0"), ("{}", "an object")] {
        cases.push(case(with_checksum(value), format!("the checksum must be a string, got {got}")));
    }
    let digits = [
        String::new(),
        "0".repeat(31),
        "0".repeat(33),
        "A".repeat(32),
        "g".repeat(32),
        " ".repeat(32),
        format!("0x{}", "0".repeat(30)),
        // 32 bytes, and 32 characters.
        "é".repeat(16),
        "٠".repeat(32),
    ];
    for digits in digits {
        let sentence = format!("the checksum must be 32 digits 0-9 and a-f, got {digits:?}");
        cases.push(case(with_checksum(&format!("{digits:?}")), sentence));
    }
    // Sound in all but the sum: never sealed, a bit of the data, the sum itself.
    let valid = entry(A);
    let stated = |file: &[u8]| String::from_utf8(file[CHECKSUM_AT].to_vec()).unwrap();
    let mut zeros = valid.clone();
    zeros[CHECKSUM_AT].fill(b'0');
    let mut data = valid.clone();
    data[valid.len() - 1] ^= 0x80;
    let mut reversed = valid.clone();
    reversed[CHECKSUM_AT].reverse();
    let mut digit = valid.clone();
    digit[CHECKSUM_AT.start] = if digit[CHECKSUM_AT.start] == b'0' { b'1' } else { b'0' };
    for file in [zeros, data, reversed, digit] {
        let mut right = file.clone();
        seal(&mut right);
        let (right, wrong) = (stated(&right), stated(&file));
        let remedy = "the file is damaged, restore it from a copy";
        cases.push(case(file, format!("the checksum must be {right} as the contents give, got {wrong}; {remedy}")));
    }
    cases
}

/// Headers that do not open with the text behind which the checksum is.
fn openings() -> Vec<Case> {
    let valid = String::from_utf8(of_tree("1")).unwrap();
    let header = valid[8..].trim_end();
    let changed = [
        header.replace("{\"__", " {\"__"),
        header.replace("{\"__", "\n{\"__"),
        header.replace("{\"__", "{ \"__"),
        header.replace("__\":", "__\" :"),
        header.replace("__\":", "__\": "),
        header.replace("__metadata__", "\\u005f_metadata__"),
        header.replace("roptim", "\\u0072optim"),
        header.replace("\"{", "\" {"),
        header.replace("\"{", "\"{ "),
        header.replace("\"{", "\"\\u007b"),
        header.replace("format", "form\\\\u0061t"),
        header.replace("1,", "1 ,"),
        header.replace("\\\"format\\\":1,", "").replace("\\\"tree", "\\\"format\\\":1,\\\"tree"),
    ];
    changed
        .map(|header| {
            let sentence = "the header's opening must be in canonical form, got another form of the same JSON";
            case(with_header(header, &[]), sentence)
        })
        .into()
}

fn names() -> Vec<Case> {
    let mut cases = Vec::new();
    for len in [0, 4097, 100_000] {
        let sentence = format!("a tensor's name must be 1 to 4096 bytes long, got {len}");
        cases.push(case(entry(&format!(r#""{}":{{}}"#, "n".repeat(len))), sentence));
    }
    // 4098 bytes in fewer characters.
    let sentence = "a tensor's name must be 1 to 4096 bytes long, got 4098";
    cases.push(case(entry(&format!(r#""{}":{{}}"#, "é".repeat(2049))), sentence));
    let forbidden = [
        ("a/b", r#""a/b""#),
        ("/", r#""/""#),
        ("/etc/passwd", r#""/etc/passwd""#),
        ("../a", r#""../a""#),
        (r"a\\b", r#""a\\b""#),
        (r"..\\a", r#""..\\a""#),
        (r"C:\\a", r#""C:\\a""#),
        (r"a\u0000", r#""a\0""#),
        (r"\u0000", r#""\0""#),
        (r"a\nb", r#""a\nb""#),
        (r"\u001b[2J", r#""\u{1b}[2J""#),
        ("a\u{7f}", r#""a\u{7f}""#),
        ("a\u{85}", r#""a\u{85}""#),
        (r"a\u009b", r#""a\u{9b}""#),
    ];
    for (name, got) in forbidden {
        let sentence = format!("a tensor's name must be without slashes and control characters, got {got}");
        cases.push(case(entry(&format!(r#""{name}":{{}}"#)), sentence));
    }
    // The name is the place, and nothing else.
    let named = |tree: &str, name: &str| forged(tree, &listed(name, "F32", "[1]", "[0,4]"), &[0; 4]);
    let places = [
        (r#"{"b":{"$tensor":"?"}}"#, "a", "b"),
        (r#"{"a":{"$tensor":"?"}}"#, "A", "a"),
        (r#"{"a":{"$tensor":"?"}}"#, ":a", "a"),
        (r#"{"a":{"$tensor":"?"}}"#, "%61", "a"),
        (r#"{"a":{"$scalar":"?"}}"#, "tensor", "a"),
        (r#"{"a":{"b":{"$tensor":"?"}}}"#, "a.b", "a:b"),
        (r#"{"a":[{"$tensor":"?"}]}"#, "a:0", "a[0]"),
        (r#"{"a":[{"$tensor":"?"}]}"#, "a[1]", "a[0]"),
        (r#"{"a":{"$tuple":[{"$tensor":"?"}]}}"#, "a:$tuple[0]", "a[0]"),
        (r##"{"#5":{"$tensor":"?"}}"##, "5", "[5]"),
        (r##"{"#-5":{"$tensor":"?"}}"##, "[5]", "[-5]"),
        (r#"{"5":{"$tensor":"?"}}"#, "[5]", "5"),
        (r#"{"":{"$tensor":"?"}}"#, "tensor", "%"),
        (r#"{"$$a":{"$tensor":"?"}}"#, "$$a", "$a"),
        (r#"{".":{"$tensor":"?"}}"#, ".", "%2E"),
        (r#"{"..":{"$tensor":"?"}}"#, "..", "%2E."),
        (r#"{"a:b":{"$tensor":"?"}}"#, "a:b", "a%3Ab"),
        (r#"{"a/b":{"$tensor":"?"}}"#, "a%2fb", "a%2Fb"),
        (r#"{"%":{"$tensor":"?"}}"#, "%", "%25"),
        (r#"{"a\u0000":{"$tensor":"?"}}"#, "a%0", "a%00"),
        (r#"{"__metadata__":{"$tensor":"?"}}"#, "%5f_metadata__", "%5F_metadata__"),
        (r#"{"$tensor":"?"}"#, "%", "tensor"),
        // One letter in two forms, of which Unicode says that they are the same.
        ("{\"\u{e9}\":{\"$tensor\":\"?\"}}", "e\u{301}", "\u{e9}"),
    ];
    for (tree, wrong, right) in places {
        let shape = |file: &str| if tree.contains("$scalar") { file.replace("[1]", "[]") } else { file.to_owned() };
        let file = |name: &str| forged(&tree.replace('?', name), &shape(&listed(name, "F32", "[1]", "[0,4]")), &[0; 4]);
        cases.push(another_form(file(wrong), file(right)));
    }
    let file = named(r#"{"__metadata__":{"$tensor":"__metadata__"}}"#, "__metadata__");
    cases.push(case(file, "the header must be strict JSON, got the key \"__metadata__\" twice at …"));
    // A key that no tensor can be named by.
    let key = "k".repeat(4097);
    let file = named(&format!(r#"{{"{key}":{{"$tensor":"a"}}}}"#), "a");
    let shown = "k".repeat(60);
    cases.push(case(file, format!("the name of {shown}… must be at most 4096 bytes, got 4097")));
    cases
}

/// What a header says of a tensor, but for the numbers.
fn entries() -> Vec<Case> {
    let mut cases = Vec::new();
    for (text, got) in [("null", "null"), ("1", "1"), ("[]", "a list of 0"), ("\"F32\"", "\"F32\"")] {
        cases.push(case(entry(&format!(r#""a":{text}"#)), format!("tensor \"a\" must be an object, got {got}")));
    }
    let fields = [("dtype", r#""F32""#), ("shape", "[1]"), ("data_offsets", "[0,4]")];
    for (field, value) in fields {
        let without = A.replace(&format!("\"{field}\":{value}"), "").replace(",,", ",");
        let without = without.replace("{,", "{").replace(",}", "}");
        cases.push(case(entry(&without), format!("{field} of tensor \"a\" must be present, got none")));
        let again = A.replace('}', &format!(",\"{field}\":{value}}}"));
        cases.push(case(entry(&again), format!("the header must be strict JSON, got the key \"{field}\" twice at …")));
        let escaped = format!("\\u{:04x}{}", u32::from(field.as_bytes()[0]), &field[1..]);
        let again = A.replace('}', &format!(",\"{escaped}\":{value}}}"));
        cases.push(case(entry(&again), format!("the header must be strict JSON, got the key \"{field}\" twice at …")));
    }
    cases.push(case(entry(r#""a":{}"#), "dtype of tensor \"a\" must be present, got none"));
    for field in ["x", "", "Dtype", "offsets", "$dtype", "strides"] {
        let file = entry(&A.replace('}', &format!(",{field:?}:1}}")));
        let sentence = format!("a field of tensor \"a\" must be dtype, shape or data_offsets, got {field:?}");
        cases.push(case(file, sentence));
    }
    let known = "BOOL I8 I16 I32 I64 U8 U16 U32 U64 F16 BF16 F32 F64 C64";
    let unknown = "F33 f32 float32 FLOAT F8_E4M3 F8_E5M2 F4 C128 complex128 I128 U1 BOOLEAN <f4 O F32\u{a0}";
    for dtype in unknown.split(' ').chain([""]) {
        let file = entry(&A.replace("F32", dtype));
        let sentence = format!("dtype of tensor \"a\" must be one of {known}, got {dtype:?}");
        cases.push(case(file, sentence));
    }
    let others = [("null", "null"), ("4", "4"), ("[]", "a list of 0"), ("{}", "an object")];
    for (text, got) in others {
        let file = entry(&A.replace("\"F32\"", text));
        cases.push(case(file, format!("dtype of tensor \"a\" must be a string, got {got}")));
    }
    for (text, got) in [("null", "null"), ("1", "1"), ("{}", "an object"), ("\"[1]\"", "\"[1]\"")] {
        let file = entry(&A.replace("[1]", text));
        cases.push(case(file, format!("shape of tensor \"a\" must be a list, got {got}")));
        let file = entry(&A.replace("[0,4]", text));
        cases.push(case(file, format!("data_offsets of tensor \"a\" must be a list, got {got}")));
    }
    let forms = [
        r#""a":{"shape":[1],"dtype":"F32","data_offsets":[0,4]}"#.to_owned(),
        r#""a":{"dtype":"F32","data_offsets":[0,4],"shape":[1]}"#.to_owned(),
        format!(" {A}"),
        format!("{A}\n"),
        A.replace("[1]", "[ 1]"),
        A.replace("[0,4]", "[0, 4]"),
        A.replace("\"a\"", "\"\\u0061\""),
        A.replace("dtype", "dt\\u0079pe"),
        A.replace("F32", "F3\\u0032"),
    ];
    cases.extend(forms.map(|form| another_form(entry(&form), entry(A))));
    cases
}

fn shapes_and_offsets() -> Vec<Case> {
    let mut cases = Vec::new();
    let no_sizes = [
        ("-1", "-1"),
        ("1.0", "1.0"),
        ("1e0", "1.0"),
        ("-0", "-0.0"),
        ("-9223372036854775809", "-9.223372036854776e18"),
        ("18446744073709551616", "1.8446744073709552e19"),
        ("1e308", "1e308"),
        ("null", "null"),
        ("true", "true"),
        ("\"1\"", "\"1\""),
        ("[1]", "a list of 1"),
        ("{}", "an object"),
    ];
    for (text, got) in no_sizes {
        let allowed = "of integers from 0 to what memory can address";
        let file = entry(&A.replace("[1]", &format!("[{text}]")));
        cases.push(case(file, format!("shape of tensor \"a\" must be {allowed}, got {got}")));
        let file = entry(&A.replace("[0,4]", &format!("[0,{text}]")));
        cases.push(case(file, format!("data_offsets of tensor \"a\" must be {allowed}, got {got}")));
    }
    let of = |dtype: &str, shape: &str, offsets: &str| entry(&listed("a", dtype, shape, offsets));
    let too_large = [
        ("F32", "float32", "[4294967296, 4294967296]"),
        ("U8", "uint8", "[9223372036854775808]"),
        ("U8", "uint8", "[18446744073709551615]"),
        ("BOOL", "bool", "[2, 4611686018427387904]"),
        ("F16", "float16", "[4611686018427387904]"),
        ("F32", "float32", "[2305843009213693952]"),
        ("F64", "float64", "[1152921504606846976]"),
        ("C64", "complex64", "[1152921504606846976]"),
        ("F64", "float64", "[2, 576460752303423488]"),
        // An axis of extent 0 excuses no other one.
        ("F32", "float32", "[0, 18446744073709551615]"),
        ("U8", "uint8", "[18446744073709551615, 0, 18446744073709551615]"),
        ("F32", "float32", "[3, 6148914691236517206]"),
    ];
    for (dtype, name, shape) in too_large {
        let file = of(dtype, &shape.replace(' ', ""), "[0,4]");
        cases.push(case(file, format!("shape of tensor \"a\" must be one that fits in memory, got {shape} of {name}")));
    }
    for axes in [33, 1000] {
        let shape = format!("[{}1]", "1,".repeat(axes - 1));
        let sentence = format!("shape of tensor \"a\" must be of at most 32 axes, got {axes}");
        cases.push(case(of("F32", &shape, "[0,4]"), sentence));
    }
    for (offsets, count) in [("[]", 0), ("[0]", 1), ("[0,4,8]", 3)] {
        let sentence = format!("data_offsets of tensor \"a\" must be two numbers, got {count}");
        cases.push(case(of("F32", "[1]", offsets), sentence));
    }
    for from in ["1", "4", "9223372036854775808", "18446744073709551612"] {
        let sentence = "data_offsets of tensor \"a\" must be from 0, where the tensor before it ends";
        cases.push(case(of("F32", "[1]", &format!("[{from},0]")), format!("{sentence}, got from {from}")));
    }
    // The end wraps around to 4.
    let sentence = "data_offsets of tensor \"a\" must be from 0, where the tensor before it ends";
    let offsets = "[18446744073709551615,3]";
    cases.push(case(of("F32", "[1]", offsets), format!("{sentence}, got from 18446744073709551615")));
    let apart = [
        ("[1]", 4, "3"),
        ("[1]", 4, "0"),
        ("[1]", 4, "5"),
        ("[]", 4, "8"),
        ("[2]", 8, "4"),
        ("[0]", 0, "4"),
        ("[3,0,2]", 0, "24"),
        ("[1]", 4, "4294967300"),
        ("[1]", 4, "9223372036854775812"),
        ("[1]", 4, "18446744073709551615"),
    ];
    for (shape, len, to) in apart {
        let sentence = format!("data_offsets of tensor \"a\" must be {len} apart as the shape asks, got 0 and {to}");
        cases.push(case(of("F32", shape, &format!("[0,{to}]")), sentence));
    }
    let beyond =
        [("F32", 2, 8), ("U8", 5, 5), ("U8", 1 << 40, 1 << 40), ("F32", 1 << 60, 1 << 62), ("I8", i64::MAX, i64::MAX)];
    for (dtype, extent, end) in beyond {
        let file = of(dtype, &format!("[{extent}]"), &format!("[0,{end}]"));
        cases.push(case(file, format!("tensor \"a\" must be within the 4 bytes of data, got an end at {end}")));
    }
    cases
}

/// Several tensors, and the data.
fn layouts() -> Vec<Case> {
    let two = |first: &str, second: &str, len: usize| forged("1", &format!("{first},{second}"), &vec![0; len]);
    let f32 = |name: &str, offsets: &str| listed(name, "F32", "[1]", offsets);
    let mut cases = Vec::new();
    // The same bytes, some of the same bytes, a hole, bytes from before the first.
    for (offsets, from) in [("[0,4]", 0), ("[2,6]", 2), ("[5,9]", 5), ("[8,12]", 8), ("[0,8]", 0)] {
        let sentence = "data_offsets of tensor \"b\" must be from 4, where the tensor before it ends";
        let file = two(A, &f32("b", offsets), 12);
        cases.push(case(file, format!("{sentence}, got from {from}")));
    }
    let empty = |name: &str, dtype: &str| listed(name, dtype, "[0]", "[0,0]");
    let orders = [
        (f32("b", "[0,4]"), f32("a", "[4,8]"), "a", "b"),
        (A.to_owned(), f32("A", "[4,8]"), "A", "a"),
        (f32("\u{e9}", "[0,4]"), f32("z", "[4,8]"), "z", "\u{e9}"),
        (f32("a[2]", "[0,4]"), f32("a[10]", "[4,8]"), "a[10]", "a[2]"),
        (A.to_owned(), listed("b", "F64", "[1]", "[4,12]"), "b", "a"),
        (A.to_owned(), listed("b", "C64", "[1]", "[4,12]"), "b", "a"),
        (listed("a", "U8", "[4]", "[0,4]"), listed("b", "F16", "[2]", "[4,8]"), "b", "a"),
        (listed("a", "F16", "[2]", "[0,4]"), f32("b", "[4,8]"), "b", "a"),
        (empty("b", "F32"), empty("a", "F32"), "a", "b"),
        (empty("a", "U8"), empty("b", "F64"), "b", "a"),
    ];
    for (first, second, name, behind) in orders {
        let sentence = format!("tensor {name:?} must be in order of element size, then name");
        cases.push(case(two(&first, &second, 12), format!("{sentence}, got its place behind {behind:?}")));
    }
    // The same name for the same bytes, for others, for none.
    for second in [A, &f32("a", "[4,8]"), &f32("\\u0061", "[4,8]"), &listed("a", "I32", "[1]", "[0,4]")] {
        cases.push(case(two(A, second, 8), "the header must be strict JSON, got the key \"a\" twice at …"));
    }
    let file = two(&empty("a", "F32"), &empty("a", "F32"), 0);
    cases.push(case(file, "the header must be strict JSON, got the key \"a\" twice at …"));
    for len in [5, 8, 68] {
        let sentence = format!("the data must be 4 bytes long, got {len}, with trailing bytes");
        cases.push(case(forged(TREE_A, A, &vec![0; len]), sentence));
    }
    for len in [0, 3] {
        let sentence = format!("tensor \"a\" must be within the {len} bytes of data, got an end at 4");
        cases.push(case(forged(TREE_A, A, &vec![0; len]), sentence));
    }
    cases.push(case(forged("1", "", &[0]), "the data must be 0 bytes long, got 1, with trailing bytes"));
    // A second file behind the first.
    let valid = of_tree("1");
    let sentence = format!("the data must be 0 bytes long, got {}, with trailing bytes", valid.len());
    cases.push(case([valid.clone(), valid].concat(), sentence));
    cases
}

fn references() -> Vec<Case> {
    let with_a = |tree: &str| forged(tree, A, &[0; 4]);
    let mut cases = vec![
        case(with_a("1"), "tensor \"a\" must be part of the tree, got no reference to it"),
        case(with_a(r#"{"a":"a"}"#), "tensor \"a\" must be part of the tree, got no reference to it"),
        case(
            forged(TREE_A, &format!("{A},{}", listed("b", "U8", "[0]", "[4,4]")), &[0; 4]),
            "tensor \"b\" must be part of the tree, got no reference to it",
        ),
    ];
    for tree in [
        r#"{"a":{"$tensor":"a"},"b":{"$tensor":"a"}}"#,
        r#"[{"$tensor":"a"},{"$tensor":"a"}]"#,
        r#"{"a":{"$tensor":"a"},"b":{"$scalar":"a"}}"#,
        r#"{"a":{"$tensor":"a"},"b":{"$tensor":"a","$dtype":"complex128"}}"#,
    ] {
        cases.push(case(with_a(tree), "tensor \"a\" must be in the tree once, got a second reference to it"));
    }
    for (name, shown) in [("b", "b"), ("", ""), ("A", "A"), ("__metadata__", "__metadata__"), (r"a\u0000", r"a\0")] {
        let file = with_a(&format!(r#"{{"a":{{"$tensor":"{name}"}}}}"#));
        cases.push(case(file, format!("tensor \"{shown}\" must be in the header, got a reference to nothing")));
    }
    for shape in ["[1]", "[1,1]"] {
        let file = forged(r#"{"a":{"$scalar":"a"}}"#, &listed("a", "F32", shape, "[0,4]"), &[0; 4]);
        cases.push(case(file, format!("scalar \"a\" must be without axes, got {}", shape.replace(',', ", "))));
    }
    let file = forged(r#"{"a":{"$scalar":"a"}}"#, &listed("a", "F32", "[0]", "[0,0]"), &[]);
    cases.push(case(file, "scalar \"a\" must be without axes, got [0]"));
    let complex = r#"{"a":{"$scalar":"a","$dtype":"complex128"}}"#;
    let file = forged(complex, &listed("a", "F64", "[1,2]", "[0,16]"), &[0; 16]);
    cases.push(case(file, "scalar \"a\" must be without axes, got [1]"));
    cases
}

/// The second key of a reference.
fn second_keys() -> Vec<Case> {
    let with_second = |second: &str| forged(&format!(r#"{{"a":{{"$tensor":"a",{second}}}}}"#), A, &[0; 4]);
    let mut cases = Vec::new();
    for (second, got) in [
        (r#""x":"complex128""#, r#""x" with "complex128""#),
        (r#""$Dtype":"complex128""#, r#""$Dtype" with "complex128""#),
        (r#""$scalar":"a""#, r#""$scalar" with "a""#),
        (r#""$dtype":1"#, r#""$dtype" with 1"#),
        (r#""$dtype":null"#, r#""$dtype" with null"#),
        (r#""$dtype":["complex128"]"#, r#""$dtype" with a list of 1"#),
    ] {
        let sentence = format!("the second key of tensor \"a\" must be $dtype with a string, got {got}");
        cases.push(case(with_second(second), sentence));
    }
    for dtype in ["int8", "complex64", "float32", "Complex128", ""] {
        let sentence = format!("$dtype of tensor \"a\" must be complex128, got {dtype:?}");
        cases.push(case(with_second(&format!("\"$dtype\":{dtype:?}")), sentence));
    }
    let complex = r#"{"a":{"$tensor":"a","$dtype":"complex128"}}"#;
    let wrong = [
        ("F32", "[2]", 8),
        ("C64", "[2]", 16),
        ("I64", "[2]", 16),
        ("U8", "[16]", 16),
        ("F64", "[]", 8),
        ("F64", "[1]", 8),
        ("F64", "[3]", 24),
        ("F64", "[2,1]", 16),
        ("F64", "[2,0]", 0),
    ];
    for (dtype, shape, len) in wrong {
        let file = forged(complex, &listed("a", dtype, shape, &format!("[0,{len}]")), &vec![0; len]);
        let allowed = "stored as F64 with a last axis of 2 to be complex128";
        cases.push(case(file, format!("tensor \"a\" must be {allowed}, got {dtype} of another shape or type")));
    }
    for tree in [r#"{"$tensor":"a","$dtype":"complex128","y":1}"#, r#"{"$scalar":"a","x":1,"y":1,"z":1}"#] {
        let tag = &tree[2..9];
        cases.push(case(
            forged(tree, A, &[0; 4]),
            format!("an object with {tag} must be of at most two keys, got \"y\""),
        ));
    }
    for (byte, shape) in [(2, "[1]"), (255, "[1]"), (0x80, "[]"), (3, "[2,2]")] {
        let mut data = vec![byte; 1];
        if shape == "[2,2]" {
            data = vec![0, 1, 1, byte];
        }
        let offsets = format!("[0,{}]", data.len());
        let tag = if shape == "[]" { "$scalar" } else { "$tensor" };
        let file = forged(&format!(r#"{{"a":{{"{tag}":"a"}}}}"#), &listed("a", "BOOL", shape, &offsets), &data);
        cases.push(case(file, format!("tensor \"a\" must be of the bytes 0 and 1 as BOOL, got a byte {byte}")));
    }
    cases
}

fn tags() -> Vec<Case> {
    let mut cases = Vec::new();
    for tag in ["$set", "$", "$Tuple", "$tuple ", "$list", "$dtype", "$é", "$0", "$bytes"] {
        let sentence = format!("a tag must be $tuple, $int, $float, $tensor or $scalar, got {tag:?}");
        cases.push(case(of_tree(&format!("{{{tag:?}:[]}}")), sentence));
    }
    for (tree, tag) in [
        (r#"{"a":1,"$tuple":[]}"#, "$tuple"),
        (r#"{"a":1,"$b":1}"#, "$b"),
        (r#"{"$$a":1,"$float":"inf"}"#, "$float"),
        (r##"{"#1":1,"$":1}"##, "$"),
        (r#"[[{"a":[],"$int":"5"}]]"#, "$int"),
    ] {
        cases.push(case(of_tree(tree), format!("a tag must be the first key of its object, got {tag:?}")));
    }
    for (tree, tag, extra) in [
        (r#"{"$tuple":[],"a":1}"#, "$tuple", "a"),
        (r#"{"$tuple":[],"$tuple ":[]}"#, "$tuple", "$tuple "),
        (r#"{"$float":"nan","$dtype":"float32"}"#, "$float", "$dtype"),
        (r#"{"$int":"18446744073709551616","":1}"#, "$int", ""),
        (r#"{"$set":[],"a":1}"#, "$set", "a"),
        (r#"{"$dtype":"complex128","$tensor":"a"}"#, "$dtype", "$tensor"),
    ] {
        cases.push(case(of_tree(tree), format!("an object with {tag} must be of that one key, got {extra:?}")));
    }
    let values = [("null", "null"), ("1", "1"), ("1.5", "1.5"), ("{}", "an object"), ("true", "true")];
    for (text, got) in values.into_iter().chain([("\"[]\"", "\"[]\"")]) {
        cases.push(case(of_tree(&format!(r#"{{"$tuple":{text}}}"#)), format!("$tuple must be a list, got {got}")));
    }
    for tag in ["$int", "$float", "$tensor", "$scalar"] {
        for (text, got) in values.into_iter().chain([("[]", "a list of 0")]) {
            cases.push(case(of_tree(&format!(r#"{{"{tag}":{text}}}"#)), format!("{tag} must be a string, got {got}")));
        }
    }
    cases
}

fn numbers() -> Vec<Case> {
    let mut cases = Vec::new();
    let long = "1".repeat(1235);
    let integers = [
        "",
        "0",
        "5",
        "-5",
        "-",
        "--18446744073709551616",
        "-0",
        "9223372036854775808",
        "18446744073709551615",
        "-9223372036854775808",
        "+18446744073709551616",
        "018446744073709551616",
        "-018446744073709551616",
        "000000000000000000000",
        "18446744073709551616.0",
        "1e30",
        " 18446744073709551616",
        "18446744073709551616 ",
        "18_446_744_073_709_551_616",
        "0x10000000000000000",
        "１８４４６７４４０７３７０９５５１６１６",
        "inf",
    ];
    let allowed = "an integer beyond 64 bits in at most 1234 digits";
    for text in integers {
        cases.push(case(of_tree(&format!(r#"{{"$int":{text:?}}}"#)), format!("$int must be {allowed}, got {text:?}")));
    }
    for text in [long.clone(), format!("-{long}"), "9".repeat(100_000)] {
        let sentence = format!("$int must be {allowed}, got \"{}\"…", &text[..60]);
        cases.push(case(of_tree(&format!(r#"{{"$int":"{text}"}}"#)), sentence));
    }
    let floats = [
        "",
        "0",
        "1.5",
        "1e999",
        "INF",
        "Inf",
        "+inf",
        "-Inf",
        "inf ",
        "infinity",
        "-infinity",
        "NaN",
        "NAN",
        "-nan",
        "nan ",
        "nan:",
        "nan(0x1)",
        "nan:0000000000000000",
        "nan:3ff0000000000000",
        // The bits of the infinities, and of the largest finite number.
        "nan:7ff0000000000000",
        "nan:fff0000000000000",
        "nan:7fefffffffffffff",
        "nan:7ff800000000000g",
        "nan:-7ff8000000000001",
        "nan: 7ff8000000000001",
        "nan:17ff8000000000001",
        "nan:0x7ff8000000000001",
        "NAN:7ff8000000000001",
    ];
    for text in floats {
        let sentence = format!("$float must be inf, -inf, nan or the bits of a NaN, got {text:?}");
        cases.push(case(of_tree(&format!(r#"{{"$float":{text:?}}}"#)), sentence));
    }
    let broken = [
        ("NaN", "expected value"),
        ("Infinity", "expected value"),
        ("inf", "expected value"),
        ("1e999", "number out of range"),
        ("-1e309", "number out of range"),
        ("01", "invalid number"),
        ("-", "invalid number"),
        ("00", "invalid number"),
        ("1.", "invalid number"),
        ("1.e5", "invalid number"),
        (".1", "expected value"),
        ("+1", "expected value"),
        ("0x1", "expected `,` or `}`"),
        ("1l", "expected `,` or `}`"),
        ("1j", "expected `,` or `}`"),
    ];
    for (text, got) in broken {
        cases.push(case(of_tree(text), format!("__metadata__.roptim must be strict JSON, got {got} at …")));
    }
    let forms = [
        ("-0", "-0.0"),
        ("1.50", "1.5"),
        ("1.00", "1.0"),
        ("1e0", "1.0"),
        ("1E5", "100000.0"),
        ("1.0e5", "100000.0"),
        ("1e5", "100000.0"),
        ("1e15", "1000000000000000.0"),
        ("10000000000000000.0", "1e16"),
        ("1.0e16", "1e16"),
        ("1e+16", "1e16"),
        ("1E16", "1e16"),
        ("1e016", "1e16"),
        ("10e15", "1e16"),
        ("0.00001", "1e-5"),
        ("1e-05", "1e-5"),
        ("1e-4", "0.0001"),
        ("0e0", "0.0"),
        ("0.00", "0.0"),
        ("-0e5", "-0.0"),
        ("1e-400", "0.0"),
        ("-1e-400", "-0.0"),
        ("0.1000000000000000055511151231257827", "0.1"),
        ("4.94e-324", "5e-324"),
        ("1.79769313486231580e308", "1.7976931348623157e308"),
        ("18446744073709551616", "1.8446744073709552e19"),
        ("-9223372036854775809", "-9.223372036854776e18"),
        (r#"{"$float":"nan:7ff8000000000000"}"#, r#"{"$float":"nan"}"#),
        (r#"{"$float":"nan:7FF8000000000001"}"#, r#"{"$float":"nan:7ff8000000000001"}"#),
        (r#"{"$float":"nan:+7ff8000000000001"}"#, r#"{"$float":"nan:7ff8000000000001"}"#),
        (r#"{"$float":"nan:07ff8000000000001"}"#, r#"{"$float":"nan:7ff8000000000001"}"#),
        (r#"{"$float":"in\u0066"}"#, r#"{"$float":"inf"}"#),
        (r#"{"$int":"1844674407370955161\u0036"}"#, r#"{"$int":"18446744073709551616"}"#),
    ];
    cases.extend(forms.map(|(wrong, right)| another_form(of_tree(wrong), of_tree(right))));
    cases
}

fn keys() -> Vec<Case> {
    let mut cases = Vec::new();
    let integers = [
        "",
        "x",
        "01",
        "-01",
        "+1",
        "-0",
        "-",
        "--1",
        "#1",
        "$1",
        " 1",
        "1 ",
        "1.0",
        "1e3",
        "0x1",
        "１",
        "9223372036854775808",
        "-9223372036854775809",
        "18446744073709551615",
    ];
    for digits in integers {
        let allowed = "the shortest form of an integer of 64 bits with sign";
        let sentence = format!("what follows the # of a key must be {allowed}, got {digits:?}");
        cases.push(case(of_tree(&format!(r##"{{"#{digits}":1}}"##)), sentence));
    }
    let twice = [
        (r#"{"a":1,"a":2}"#, "a"),
        (r#"{"a":1,"b":2,"\u0061":3}"#, "a"),
        (r##"{"#1":1,"#1":1}"##, "#1"),
        (r##"{"#1":1,"\u00231":1}"##, "#1"),
        (r#"{"$$a":1,"$$a":1}"#, "$$a"),
        (r#"{"":1,"":1}"#, ""),
        (r#"[[{"a":1,"a":1}]]"#, "a"),
        (r#"{"$tuple":[{"a":1,"a":1}]}"#, "a"),
        (r#"{"$tuple":[],"$tuple":[]}"#, "$tuple"),
        (r#"{"$tensor":"a","$tensor":"a"}"#, "$tensor"),
        (r#"{"a":{"b":{"c":1,"c":1}}}"#, "c"),
        ("{\"\u{1f600}\":1,\"\\ud83d\\ude00\":1}", "\u{1f600}"),
    ];
    for (tree, key) in twice {
        cases.push(case(
            of_tree(tree),
            format!("__metadata__.roptim must be strict JSON, got the key {key:?} twice at …"),
        ));
    }
    cases
}

/// Strings and spaces of the tree that have another form.
fn texts() -> Vec<Case> {
    let forms = [
        (r#""\u0061""#, r#""a""#),
        (r#""\/""#, r#""/""#),
        (r#""\u0022""#, r#""\"""#),
        (r#""\u005c""#, r#""\\""#),
        (r#""\u000a""#, r#""\n""#),
        (r#""\u0008""#, r#""\b""#),
        (r#""\u000C""#, r#""\f""#),
        (r#""\u001F""#, r#""\u001f""#),
        (r#""\u001B""#, r#""\u001b""#),
        (r#""\u007f""#, "\"\u{7f}\""),
        (r#""\u00e9""#, "\"\u{e9}\""),
        (r#""\u2028""#, "\"\u{2028}\""),
        (r#""\ud83d\ude00""#, "\"\u{1f600}\""),
        (r#""\uFEFF""#, "\"\u{feff}\""),
        (r#"{"\u0061":1}"#, r#"{"a":1}"#),
        (r##"{"\u00231":1}"##, r##"{"#1":1}"##),
        (r##"{"#\u0031":1}"##, r##"{"#1":1}"##),
        (r#"{"\u0024tuple":[]}"#, r#"{"$tuple":[]}"#),
        (r#"{"\u0024$a":1}"#, r#"{"$$a":1}"#),
        (" 1", "1"),
        ("\t1", "1"),
        ("[ 1]", "[1]"),
        ("[1 ]", "[1]"),
        ("[1, 2]", "[1,2]"),
        ("[\n]", "[]"),
        ("{ }", "{}"),
        (r#"{"a": 1}"#, r#"{"a":1}"#),
        (r#"{"a" :1}"#, r#"{"a":1}"#),
        (r#"{"a":1 ,"b":2}"#, r#"{"a":1,"b":2}"#),
    ];
    let mut cases: Vec<_> = forms.map(|(wrong, right)| another_form(of_tree(wrong), of_tree(right))).into();
    let wrong = forged(r#"{"a":{"$tensor":"\u0061"}}"#, A, &[0; 4]);
    cases.push(another_form(wrong, entry(A)));
    let broken = [
        ("\"\\ud800\"", "unexpected end of hex escape"),
        ("\"\\udfff\"", "lone leading surrogate in hex escape"),
        ("\"\t\"", "control character (\\u0000-\\u001F) found while parsing a string"),
        ("\"\0\"", "control character (\\u0000-\\u001F) found while parsing a string"),
        ("'a'", "expected value"),
        ("[1,]", "trailing comma"),
        ("[,1]", "expected value"),
        ("{\"a\":1,}", "trailing comma"),
        ("", "expected value"),
        ("nul", "expected ident"),
        ("True", "expected value"),
        ("undefined", "expected value"),
        ("\u{feff}1", "expected value"),
        ("1}", "trailing characters"),
        ("1,2", "key must be a string"),
    ];
    for (text, got) in broken {
        cases.push(case(of_tree(text), format!("__metadata__.roptim must be strict JSON, got {got} at …")));
    }
    // The string around the JSON, behind its opening.
    let valid = String::from_utf8(of_tree("\"/a\"")).unwrap();
    let header = valid[8..].trim_end();
    for changed in [
        header.replace("tree", "tre\\u0065"),
        header.replace("tree", "tre\\\\u0065"),
        header.replace("/a", "\\/a"),
        header.replace("\\\"/a", "\\u0022/a"),
        header.replace("\"}}", "\"} }"),
        header.replace("\"}}", "\\u0020\"}}"),
        header.replace("\"}}", "\\n\"}}"),
    ] {
        cases.push(another_form(with_header(changed, &[]), valid.clone().into_bytes()));
    }
    cases
}

fn depths() -> Vec<Case> {
    let nested = |open: &str, close: &str, n: usize| of_tree(&format!("{}{}", open.repeat(n), close.repeat(n)));
    let around = |open: &str, inner: &str, close: &str, n: usize| {
        of_tree(&format!("{}{inner}{}", open.repeat(n), close.repeat(n)))
    };
    let sentence = "the tree must be at most 60 levels deep, got another level";
    let (tuple, dict) = (r#"{"$tuple":["#, r#"{"a":"#);
    let too_deep = [
        nested("[", "]", 61),
        nested("[", "]", 120),
        nested(tuple, "]}", 61),
        around(dict, "{}", "}", 60),
        around(r##"{"#1":"##, "{}", "}", 60),
        around(r#"[{"$tuple":["#, "[]", "]}]", 30),
        around(r#"[{"a":{"$tuple":["#, "{}", "]}}]", 20),
        around("[[", r#"{"$tuple":[]}"#, "]]", 30),
        around("[1,", "[[]]", "]", 59),
        around("[", &format!("{}{}", "[".repeat(31), "]".repeat(31)), ",1]", 30),
    ];
    let mut cases: Vec<_> = too_deep.map(|file| case(file, sentence)).into();
    let sentence = "__metadata__.roptim must be strict JSON, got recursion limit exceeded at …";
    let deeper = [
        nested("[", "]", 127),
        nested("[", "]", 100_000),
        nested(tuple, "]}", 64),
        around(dict, "1", "}", 127),
        of_tree(&"[".repeat(5_000_000)),
    ];
    cases.extend(deeper.map(|file| case(file, sentence)));
    for right in [
        nested("[", "]", 60),
        nested(tuple, "]}", 60),
        around(dict, "{}", "}", 59),
        around(r#"[{"$tuple":["#, "1", "]}]", 30),
        around(tuple, r#"{"$float":"nan"}"#, "]}", 60),
    ] {
        from_bytes(&right).unwrap();
    }
    cases
}

fn paddings() -> Vec<Case> {
    let valid = forged(r#"{"a":{"$tensor":"a"},"b":"padded"}"#, A, &[0; 4]);
    let (head, data) = valid.split_at(valid.len() - 4);
    let text = String::from_utf8(head[8..].to_vec()).unwrap();
    let text = text.trim_end();
    let right = header_len(&valid);
    let padded = |padding: &str| {
        let header = [text, padding].concat();
        let mut file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat();
        seal(&mut file);
        file
    };
    let spaces = right as usize - text.len();
    assert!(spaces > 1);
    let mut cases = Vec::new();
    for len in [0, spaces - 1, spaces + 1, spaces + 64, spaces + 8, 5000] {
        let got = text.len() + len;
        cases.push(case(padded(&" ".repeat(len)), format!("the header's length must be {right}, got {got}")));
    }
    for other in ["\t", "\n", "\r"] {
        let file = padded(&[other, &" ".repeat(spaces - 1)].concat());
        cases.push(another_form(file, valid.clone()));
    }
    for other in ["\0", "\u{a0}", "}", "x"] {
        let file = padded(&[other, &" ".repeat(spaces)].concat());
        cases.push(case(file, "the header must be strict JSON, got trailing characters at …"));
    }
    cases
}

type Theme = (&'static str, fn() -> Vec<Case>);

const THEMES: &[Theme] = &[
    ("foreign files", foreign_files),
    ("header lengths", header_lengths),
    ("JSON", json),
    ("UTF-8", utf8),
    ("metadata", metadata),
    ("versions", versions),
    ("checksums", checksums),
    ("openings", openings),
    ("names", names),
    ("entries", entries),
    ("shapes and offsets", shapes_and_offsets),
    ("layouts", layouts),
    ("references", references),
    ("second keys", second_keys),
    ("tags", tags),
    ("numbers", numbers),
    ("keys", keys),
    ("texts", texts),
    ("depths", depths),
    ("paddings", paddings),
];

/// Whether a text is where the JSON reader stopped.
fn is_location(text: &str) -> bool {
    let numbers = text.strip_prefix(" at line ").and_then(|rest| rest.split_once(" column "));
    numbers.is_some_and(|(line, column)| line.parse::<usize>().is_ok() && column.parse::<usize>().is_ok())
}

#[test]
fn each_hostile_file_is_refused_with_its_sentence() {
    let mut files = HashSet::new();
    let mut wrong = Vec::new();
    for (theme, cases) in THEMES {
        for (i, (file, sentence)) in cases().into_iter().enumerate() {
            let got = refusal(&file);
            let fits = match got.strip_prefix("checkpoint: ") {
                None => false,
                Some(got) => match sentence.strip_suffix(" at …").and_then(|known| got.strip_prefix(known)) {
                    Some(rest) => is_location(rest),
                    None => got == sentence,
                },
            };
            if !fits {
                wrong.push(format!("{theme}, case {i}:\n want {sentence}\n  got {got}"));
            }
            assert!(files.insert(file), "{theme}, case {i}: the same file twice");
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(files.len() >= 700, "{} files", files.len());
}

/// The forgeries differ from files that are read by what their cases say, not by how they are made.
#[test]
fn a_sound_forgery_is_read() {
    assert_eq!(from_bytes(&entry(A)).unwrap(), Tree::dict([("a", floats(&[0.0]))]));
    assert_eq!(entry(A), to_bytes(&Tree::dict([("a", floats(&[0.0]))])).unwrap());
}
