//! Reading request fields as vLLM's pydantic models do: numbers may come as strings, booleans as words, an explicit
//! null counts as absent, the last of duplicate keys wins, unknown keys are ignored.
//!
//! [`request_body!`] declares a request type; every field is an `Option` of a type that implements [`Field`].
//! Messages are pydantic's, so that a client that matches on them keeps working; `error.rs` turns them into the envelope.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{self, Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value, json};

/// A value inside a request body.
pub trait Field: Sized {
    /// # Errors
    /// A message that starts with "Input should be", as pydantic's.
    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error>;

    /// Its JSON schema; `{}` is any value.
    fn schema() -> Value {
        json!({})
    }
}

/// The JSON schema of a value, as a function without a generic's name.
pub fn schema_of<T: Field>() -> Value {
    T::schema()
}

/// Lets serde drive a [`Field`]; null reads as none.
pub struct Nullable<T>(pub Option<T>);

impl<'de, T: Field> Deserialize<'de> for Nullable<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OptionVisitor<T>(PhantomData<T>);
        impl<'de, T: Field> Visitor<'de> for OptionVisitor<T> {
            type Value = Nullable<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value or null")
            }
            fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
                Ok(Nullable(None))
            }
            fn visit_none<E: de::Error>(self) -> Result<Self::Value, E> {
                Ok(Nullable(None))
            }
            fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
                T::read(deserializer).map(|value| Nullable(Some(value)))
            }
        }
        deserializer.deserialize_option(OptionVisitor(PhantomData))
    }
}

/// Lets serde drive a [`Field`] inside a list, where null is not allowed.
struct Item<T>(T);

impl<'de, T: Field> Deserialize<'de> for Item<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        T::read(deserializer).map(Item)
    }
}

const INTEGER: &str = "Input should be a valid integer";
const NUMBER: &str = "Input should be a valid number";
const BOOLEAN: &str = "Input should be a valid boolean";
const STRING: &str = "Input should be a valid string";
const LIST: &str = "Input should be a valid list";
const OBJECT: &str = "Input should be a valid dictionary";

/// Largest float that still names an integer of 64 bits.
const INT64_END: f64 = 9_223_372_036_854_775_808.0;

impl Field for i64 {
    fn schema() -> Value {
        json!({ "type": "integer" })
    }

    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct IntVisitor;
        impl Visitor<'_> for IntVisitor {
            type Value = i64;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(INTEGER)
            }
            fn visit_bool<E: de::Error>(self, value: bool) -> Result<i64, E> {
                Ok(i64::from(value))
            }
            fn visit_i64<E: de::Error>(self, value: i64) -> Result<i64, E> {
                Ok(value)
            }
            fn visit_u64<E: de::Error>(self, value: u64) -> Result<i64, E> {
                i64::try_from(value).map_err(|_| E::custom("Input should be less than or equal to 9223372036854775807"))
            }
            fn visit_f64<E: de::Error>(self, value: f64) -> Result<i64, E> {
                if value.fract() != 0.0 {
                    return Err(E::custom(
                        "Input should be a valid integer, got a number with a fractional part",
                    ));
                }
                // The lowest integer itself never comes as a float; one below it does, rounded to it.
                if !(value > -INT64_END && value < INT64_END) {
                    return Err(E::custom("Input should be a valid integer of 64 bits"));
                }
                Ok(value as i64)
            }
            fn visit_str<E: de::Error>(self, value: &str) -> Result<i64, E> {
                let text = value.trim();
                let whole = text.strip_suffix(".0").unwrap_or(text);
                whole
                    .parse()
                    .map_err(|_| E::custom("Input should be a valid integer, unable to parse string as an integer"))
            }
        }
        deserializer.deserialize_any(IntVisitor)
    }
}

impl Field for f64 {
    fn schema() -> Value {
        json!({ "type": "number" })
    }

    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct FloatVisitor;
        impl Visitor<'_> for FloatVisitor {
            type Value = f64;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(NUMBER)
            }
            fn visit_bool<E: de::Error>(self, value: bool) -> Result<f64, E> {
                Ok(f64::from(u8::from(value)))
            }
            fn visit_i64<E: de::Error>(self, value: i64) -> Result<f64, E> {
                Ok(value as f64)
            }
            fn visit_u64<E: de::Error>(self, value: u64) -> Result<f64, E> {
                Ok(value as f64)
            }
            fn visit_f64<E: de::Error>(self, value: f64) -> Result<f64, E> {
                Ok(value)
            }
            /// "nan" and "inf" parse, as in Python; the bounds of the sampling parameters refuse them.
            fn visit_str<E: de::Error>(self, value: &str) -> Result<f64, E> {
                value
                    .trim()
                    .parse()
                    .map_err(|_| E::custom("Input should be a valid number, unable to parse string as a number"))
            }
        }
        deserializer.deserialize_any(FloatVisitor)
    }
}

impl Field for bool {
    fn schema() -> Value {
        json!({ "type": "boolean" })
    }

    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct BoolVisitor;
        const UNCLEAR: &str = "Input should be a valid boolean, unable to interpret input";
        impl Visitor<'_> for BoolVisitor {
            type Value = bool;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(BOOLEAN)
            }
            fn visit_bool<E: de::Error>(self, value: bool) -> Result<bool, E> {
                Ok(value)
            }
            fn visit_i64<E: de::Error>(self, value: i64) -> Result<bool, E> {
                match value {
                    0 => Ok(false),
                    1 => Ok(true),
                    _ => Err(E::custom(UNCLEAR)),
                }
            }
            fn visit_u64<E: de::Error>(self, value: u64) -> Result<bool, E> {
                self.visit_i64(i64::try_from(value).unwrap_or(-1))
            }
            fn visit_f64<E: de::Error>(self, value: f64) -> Result<bool, E> {
                if value == 0.0 {
                    Ok(false)
                } else if value == 1.0 {
                    Ok(true)
                } else {
                    Err(E::custom(BOOLEAN))
                }
            }
            fn visit_str<E: de::Error>(self, value: &str) -> Result<bool, E> {
                match value.to_ascii_lowercase().as_str() {
                    "0" | "off" | "f" | "false" | "n" | "no" => Ok(false),
                    "1" | "on" | "t" | "true" | "y" | "yes" => Ok(true),
                    _ => Err(E::custom(UNCLEAR)),
                }
            }
        }
        deserializer.deserialize_any(BoolVisitor)
    }
}

impl Field for String {
    fn schema() -> Value {
        json!({ "type": "string" })
    }

    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct StringVisitor;
        impl Visitor<'_> for StringVisitor {
            type Value = String;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(STRING)
            }
            fn visit_str<E: de::Error>(self, value: &str) -> Result<String, E> {
                Ok(value.to_owned())
            }
            fn visit_string<E: de::Error>(self, value: String) -> Result<String, E> {
                Ok(value)
            }
        }
        deserializer.deserialize_any(StringVisitor)
    }
}

impl<T: Field> Field for Vec<T> {
    fn schema() -> Value {
        json!({ "type": "array", "items": T::schema() })
    }

    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ListVisitor<T>(PhantomData<T>);
        impl<'de, T: Field> Visitor<'de> for ListVisitor<T> {
            type Value = Vec<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(LIST)
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Vec<T>, A::Error> {
                let mut list = Vec::new();
                while let Some(Item(item)) = items.next_element()? {
                    list.push(item);
                }
                Ok(list)
            }
        }
        deserializer.deserialize_any(ListVisitor(PhantomData))
    }
}

impl Field for Map<String, Value> {
    fn schema() -> Value {
        json!({ "type": "object" })
    }

    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ObjectVisitor;
        impl<'de> Visitor<'de> for ObjectVisitor {
            type Value = Map<String, Value>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(OBJECT)
            }
            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
                let mut object = Map::new();
                while let Some((key, value)) = entries.next_entry()? {
                    object.insert(key, value);
                }
                Ok(object)
            }
        }
        deserializer.deserialize_any(ObjectVisitor)
    }
}

impl Field for Value {
    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Value::deserialize(deserializer)
    }
}

/// `logit_bias`: token ids (as the keys of a JSON object) with what is added to their logits.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenMap(pub Vec<(String, f64)>);

impl Field for TokenMap {
    fn schema() -> Value {
        json!({ "type": "object", "additionalProperties": { "type": "number" } })
    }

    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TokenMapVisitor;
        impl<'de> Visitor<'de> for TokenMapVisitor {
            type Value = TokenMap;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(OBJECT)
            }
            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<TokenMap, A::Error> {
                let mut map = TokenMap::default();
                while let Some((key, Item(value))) = entries.next_entry::<String, Item<f64>>()? {
                    map.0.push((key, value));
                }
                Ok(map)
            }
        }
        deserializer.deserialize_any(TokenMapVisitor)
    }
}

/// `stop`: a string or a list of strings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StringOrList(pub Vec<String>);

impl Field for StringOrList {
    fn schema() -> Value {
        json!({ "anyOf": [{ "type": "string" }, { "type": "array", "items": { "type": "string" } }] })
    }

    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct StopVisitor;
        impl<'de> Visitor<'de> for StopVisitor {
            type Value = StringOrList;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("Input should be a valid string or list of strings")
            }
            fn visit_str<E: de::Error>(self, value: &str) -> Result<StringOrList, E> {
                Ok(StringOrList(vec![value.to_owned()]))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<StringOrList, A::Error> {
                let mut list = Vec::new();
                while let Some(Item(item)) = items.next_element()? {
                    list.push(item);
                }
                Ok(StringOrList(list))
            }
        }
        deserializer.deserialize_any(StopVisitor)
    }
}

/// A text, or a list of parts.
#[derive(Clone, Debug, PartialEq)]
pub enum TextOrList<T> {
    Text(String),
    List(Vec<T>),
}

impl<T: Field> Field for TextOrList<T> {
    fn schema() -> Value {
        json!({ "anyOf": [{ "type": "string" }, { "type": "array", "items": T::schema() }] })
    }

    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextOrListVisitor<T>(PhantomData<T>);
        impl<'de, T: Field> Visitor<'de> for TextOrListVisitor<T> {
            type Value = TextOrList<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("Input should be a valid string or list")
            }
            fn visit_str<E: de::Error>(self, value: &str) -> Result<Self::Value, E> {
                Ok(TextOrList::Text(value.to_owned()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
                let mut list = Vec::new();
                while let Some(Item(item)) = items.next_element()? {
                    list.push(item);
                }
                Ok(TextOrList::List(list))
            }
        }
        deserializer.deserialize_any(TextOrListVisitor(PhantomData))
    }
}

/// One of a fixed set of words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice<W: Words>(pub String, PhantomData<W>);

/// The words of a [`Choice`].
pub trait Words {
    const WORDS: &'static [&'static str];
}

impl<W: Words> Choice<W> {
    /// None: `word` is not among them.
    pub fn known(word: &str) -> Option<Self> {
        W::WORDS.contains(&word).then(|| Self(word.to_owned(), PhantomData))
    }
}

impl<W: Words> Field for Choice<W> {
    fn schema() -> Value {
        json!({ "type": "string", "enum": W::WORDS })
    }

    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ChoiceVisitor<W>(PhantomData<W>);
        impl<W: Words> Visitor<'_> for ChoiceVisitor<W> {
            type Value = Choice<W>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&one_of(W::WORDS))
            }
            fn visit_str<E: de::Error>(self, value: &str) -> Result<Choice<W>, E> {
                Choice::known(value).ok_or_else(|| E::custom(one_of(W::WORDS)))
            }
        }
        deserializer.deserialize_any(ChoiceVisitor(PhantomData))
    }
}

/// pydantic's wording for a bad literal: `Input should be 'a', 'b' or 'c'`.
pub fn one_of(words: &[&str]) -> String {
    let mut text = String::from("Input should be ");
    for (i, word) in words.iter().enumerate() {
        match i {
            0 => {}
            _ if i + 1 == words.len() => text.push_str(" or "),
            _ => text.push_str(", "),
        }
        text.push('\'');
        text.push_str(word);
        text.push('\'');
    }
    text
}

/// A request type, field by field.
pub trait Fields: Default {
    /// Reads the value of `key`, unless the type has no such field; then the value is left unread.
    fn read_field<'de, A: MapAccess<'de>>(&mut self, key: &str, entries: &mut A) -> Result<bool, A::Error>;

    /// The fields' names and JSON schemas, in order.
    fn properties() -> Map<String, Value>;
}

/// The name of the field of `key`: `type` is a word of Rust's.
pub fn identifier(key: &str) -> &str {
    match key {
        "type" => stringify!(r#type),
        other => other,
    }
}

/// Reads an object; fields that `T` does not have are skipped. vLLM's former `guided_…` fields with a line in the log: who sends
/// them expects constrained output.
pub fn read_fields<'de, D: Deserializer<'de>, T: Fields>(deserializer: D) -> Result<T, D::Error> {
    struct FieldsVisitor<T>(PhantomData<T>);
    impl<'de, T: Fields> Visitor<'de> for FieldsVisitor<T> {
        type Value = T;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("Input should be a valid dictionary or object to extract fields from")
        }
        fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<T, A::Error> {
            let mut body = T::default();
            while let Some(key) = entries.next_key::<String>()? {
                if !body.read_field(&key, &mut entries)? {
                    if key.starts_with("guided_") {
                        tracing::warn!("the field {key:.40} is ignored: use structured_outputs");
                    }
                    entries.next_value::<IgnoredAny>()?;
                }
            }
            Ok(body)
        }
    }
    deserializer.deserialize_any(FieldsVisitor(PhantomData))
}

/// Declares a request type whose fields are all optional. `also` names groups of fields that several types share; they
/// are request types themselves.
macro_rules! request_body {
    (
        $(#[$meta:meta])*
        pub struct $name:ident {
            $( $(#[$field_meta:meta])* pub $field:ident : $type:ty, )*
            $( also $group:ident : $group_type:ty, )*
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Debug, Default)]
        pub struct $name {
            $( $(#[$field_meta])* pub $field: Option<$type>, )*
            $( pub $group: $group_type, )*
        }

        impl $crate::server::field::Fields for $name {
            fn read_field<'de, A: serde::de::MapAccess<'de>>(
                &mut self,
                key: &str,
                entries: &mut A,
            ) -> Result<bool, A::Error> {
                match $crate::server::field::identifier(key) {
                    $( stringify!($field) => {
                        self.$field = entries.next_value::<$crate::server::field::Nullable<$type>>()?.0;
                        Ok(true)
                    } )*
                    _ => {
                        $( if self.$group.read_field(key, entries)? {
                            return Ok(true);
                        } )*
                        Ok(false)
                    }
                }
            }

            fn properties() -> serde_json::Map<String, serde_json::Value> {
                let mut properties = serde_json::Map::new();
                $( properties.insert(
                    stringify!($field).trim_start_matches("r#").to_owned(),
                    <$type as $crate::server::field::Field>::schema(),
                ); )*
                $( properties.extend(<$group_type as $crate::server::field::Fields>::properties()); )*
                properties
            }
        }

        impl $crate::server::field::Field for $name {
            fn schema() -> serde_json::Value {
                let properties = <Self as $crate::server::field::Fields>::properties();
                serde_json::json!({ "type": "object", "properties": properties })
            }

            fn read<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                $crate::server::field::read_fields(deserializer)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                $crate::server::field::read_fields(deserializer)
            }
        }
    };
}
pub(crate) use request_body;

#[cfg(test)]
mod tests {
    use super::*;

    request_body! {
        pub struct Sample {
            pub count: i64,
            pub share: f64,
            pub flag: bool,
            pub stop: StringOrList,
            pub bias: TokenMap,
            pub ids: Vec<i64>,
            also shared: Shared,
        }
    }
    request_body! {
        pub struct Shared {
            pub extra: bool,
            pub r#type: String,
            pub parts: TextOrList<Part>,
        }
    }
    request_body! {
        pub struct Part {
            pub count: i64,
        }
    }

    fn sample(text: &str) -> Result<Sample, String> {
        serde_json::from_str(text).map_err(|error| error.to_string())
    }

    #[test]
    fn numbers_and_booleans_coerce_as_in_pydantic() {
        let body = sample(r#"{"count":"2","share":"0.5","flag":"yes","ids":[1,"2",3.0]}"#).unwrap();
        assert_eq!((body.count, body.share, body.flag), (Some(2), Some(0.5), Some(true)));
        assert_eq!(body.ids, Some(vec![1, 2, 3]));
        assert_eq!(sample(r#"{"count":true}"#).unwrap().count, Some(1));
    }

    #[test]
    fn null_is_absent_and_the_last_duplicate_wins() {
        let body = sample(r#"{"count":1,"share":null,"count":3,"unknown":{"a":[1]},"extra":1}"#).unwrap();
        assert_eq!((body.count, body.share, body.shared.extra), (Some(3), None, Some(true)));
    }

    #[test]
    fn wrong_types_say_what_was_expected() {
        for (text, expected) in [
            (r#"{"count":1.5}"#, "got a number with a fractional part"),
            (r#"{"count":[]}"#, "Input should be a valid integer"),
            (
                r#"{"count":18446744073709551615}"#,
                "less than or equal to 9223372036854775807",
            ),
            (r#"{"count":1e300}"#, "valid integer of 64 bits"),
            (r#"{"share":{}}"#, "Input should be a valid number"),
            (r#"{"flag":7}"#, "unable to interpret input"),
            (r#"{"stop":3}"#, "Input should be a valid string or list of strings"),
            (r#"{"bias":[1]}"#, "Input should be a valid dictionary"),
            (r#"{"ids":[null]}"#, "Input should be a valid integer"),
        ] {
            let message = sample(text).unwrap_err();
            assert!(message.contains(expected), "{text}: {message}");
        }
    }

    #[test]
    fn a_schema_lists_the_fields() {
        let schema = Sample::schema();
        assert_eq!(
            schema["properties"]["ids"],
            json!({"type": "array", "items": {"type": "integer"}})
        );
        let names: Vec<_> = schema["properties"].as_object().unwrap().keys().collect();
        assert_eq!(
            names,
            [
                "count", "share", "flag", "stop", "bias", "ids", "extra", "type", "parts"
            ]
        );
    }

    #[test]
    fn a_text_may_stand_for_a_list_and_type_is_a_field() {
        let shared = |text: &str| sample(text).unwrap().shared;
        assert_eq!(shared(r#"{"type":"x"}"#).r#type.as_deref(), Some("x"));
        assert!(matches!(shared(r#"{"parts":"x"}"#).parts, Some(TextOrList::Text(text)) if text == "x"));
        let Some(TextOrList::List(parts)) = shared(r#"{"parts":[{"count":1},{}]}"#).parts else {
            panic!("a list is a list");
        };
        assert_eq!((parts.len(), parts[0].count), (2, Some(1)));
        for text in [r#"{"parts":7}"#, r#"{"parts":[7]}"#] {
            assert!(sample(text).unwrap_err().contains("Input should be a valid"), "{text}");
        }
    }

    #[test]
    fn literals_list_their_words() {
        assert_eq!(one_of(&["a", "b", "c"]), "Input should be 'a', 'b' or 'c'");
    }
}
