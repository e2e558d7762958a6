//! JSON as the format uses it: a strict reader, and the writer of strings and floats.

use std::collections::HashSet;
use std::fmt::{self, Write as _};

use serde::de::{DeserializeSeed, Error as _, MapAccess, SeqAccess, Visitor};

/// A JSON value. Integers and floats stay apart, objects keep their order.
#[derive(Debug)]
pub(super) enum Json {
    Null,
    Bool(bool),
    Int(i64),
    /// Above `i64::MAX`.
    UInt(u64),
    Float(f64),
    Str(String),
    List(Vec<Json>),
    Object(Vec<(String, Json)>),
}

impl Json {
    /// Reads a whole text. A repeated key of an object is refused, at any depth.
    pub(super) fn parse(text: &str) -> Result<Self, serde_json::Error> {
        let mut reader = serde_json::Deserializer::from_str(text);
        let json = Strict.deserialize(&mut reader)?;
        reader.end()?;
        Ok(json)
    }

    /// How messages call it.
    pub(super) fn describe(&self) -> String {
        match self {
            Self::Null => "null".into(),
            Self::Bool(x) => x.to_string(),
            Self::Int(x) => x.to_string(),
            Self::UInt(x) => x.to_string(),
            Self::Float(x) => format!("{x:?}"),
            Self::Str(x) => shown(x),
            Self::List(x) => format!("a list of {}", x.len()),
            Self::Object(_) => "an object".into(),
        }
    }
}

/// A string of unknown origin in a message: quoted, escaped, and cut where it is long.
pub(super) fn shown(text: &str) -> String {
    const SHOWN: usize = 60;
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
    }
}

pub(super) struct Strict;

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = Json;

    fn deserialize<D: serde::Deserializer<'de>>(self, reader: D) -> Result<Json, D::Error> {
        reader.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Json, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E>(self, x: bool) -> Result<Json, E> {
        Ok(Json::Bool(x))
    }

    fn visit_i64<E>(self, x: i64) -> Result<Json, E> {
        Ok(Json::Int(x))
    }

    fn visit_u64<E>(self, x: u64) -> Result<Json, E> {
        Ok(i64::try_from(x).map_or(Json::UInt(x), Json::Int))
    }

    fn visit_f64<E>(self, x: f64) -> Result<Json, E> {
        Ok(Json::Float(x))
    }

    fn visit_str<E>(self, x: &str) -> Result<Json, E> {
        Ok(Json::Str(x.to_owned()))
    }

    fn visit_string<E>(self, x: String) -> Result<Json, E> {
        Ok(Json::Str(x))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Json, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(Strict)? {
            list.push(item);
        }
        // A list of one item has room for four: in nested lists that would be most of the memory.
        list.shrink_to_fit();
        Ok(Json::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut items: A) -> Result<Json, A::Error> {
        let mut object: Vec<(String, Json)> = Vec::new();
        let mut seen = HashSet::new();
        while let Some(key) = items.next_key::<String>()? {
            if !seen.insert(key.clone()) {
                return Err(A::Error::custom(format!("the key {} twice", shown(&key))));
            }
            object.push((key, items.next_value_seed(Strict)?));
        }
        object.shrink_to_fit();
        Ok(Json::Object(object))
    }
}

/// Appends a string with the shortest escapes JSON has; everything from U+0020 on but `"` and `\` is
/// itself.
pub(super) fn push_str(out: &mut String, text: &str) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\u{8}' => out.push_str("\\b"),
            '\t' => out.push_str("\\t"),
            '\n' => out.push_str("\\n"),
            '\u{c}' => out.push_str("\\f"),
            '\r' => out.push_str("\\r"),
            c if c < ' ' => {
                // Writing to a String cannot fail.
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// Appends a finite float: the shortest digits that read back as the same number, always with a point
/// or an exponent, so that it is told from an integer.
pub(super) fn push_float(out: &mut String, x: f64) {
    // Writing to a String cannot fail.
    let _ = write!(out, "{x:?}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeated_keys_are_refused_at_any_depth() {
        for text in [r#"{"a":1,"a":1}"#, r#"[{"b":{"a":1,"\u0061":2}}]"#] {
            assert!(Json::parse(text).unwrap_err().to_string().contains("the key \"a\" twice"), "{text}");
        }
        assert!(Json::parse(r#"{"a":{"a":1},"b":{"a":1}}"#).is_ok());
    }

    #[test]
    fn deep_json_is_refused() {
        assert!(Json::parse(&"[".repeat(100_000)).is_err());
        let nested = |n| format!("{}{}", "[".repeat(n), "]".repeat(n));
        assert!(Json::parse(&nested(127)).is_ok());
        assert!(Json::parse(&nested(128)).is_err());
    }

    /// Files name floats by these texts: another text would be another format.
    #[test]
    fn floats_have_one_text() {
        let cases = [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.1, "0.1"),
            (0.999, "0.999"),
            (0.0001, "0.0001"),
            (0.00001, "1e-5"),
            (1e-8, "1e-8"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e16"),
            (1.5e300, "1.5e300"),
            (5e-324, "5e-324"),
            (f64::MAX, "1.7976931348623157e308"),
            (2.0f64.powi(53), "9007199254740992.0"),
        ];
        for (x, text) in cases {
            let mut out = String::new();
            push_float(&mut out, x);
            assert_eq!(out, text);
            assert!(matches!(Json::parse(text), Ok(Json::Float(y)) if y.to_bits() == x.to_bits()), "{text}");
        }
    }

    #[test]
    fn strings_have_one_text() {
        let text: String = (0..0x180).filter_map(char::from_u32).collect();
        let mut out = String::new();
        push_str(&mut out, &text);
        assert!(matches!(Json::parse(&out), Ok(Json::Str(back)) if back == text));
        let mut out = String::new();
        push_str(&mut out, "a\"\\/\u{1}\n\u{7f}é");
        assert_eq!(out, "\"a\\\"\\\\/\\u0001\\n\u{7f}é\"");
    }
}
