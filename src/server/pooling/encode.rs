//! Vectors on the wire: numbers, base64 or raw bytes, of a type and byte order.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use super::types::{ByteOrders, EmbedTypes, Encoded, EncodingFormats};
use crate::server::error::ApiError;
use crate::server::field::Choice;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Float,
    Base64,
    /// Raw, with a header that tells where each vector lies.
    Bytes,
    /// Raw.
    BytesOnly,
}

#[derive(Clone, Copy, Debug)]
pub struct Encoding {
    pub format: Format,
    pub element: Element,
    pub big_endian: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    Float32,
    Float16,
    Bfloat16,
}

impl Element {
    pub fn name(self) -> &'static str {
        match self {
            Element::Float32 => "float32",
            Element::Float16 => "float16",
            Element::Bfloat16 => "bfloat16",
        }
    }
}

impl Encoding {
    /// # Errors
    /// 400: a type of 8 bits.
    pub fn new(
        format: Option<&Choice<EncodingFormats>>,
        element: Option<&Choice<EmbedTypes>>,
        order: Option<&Choice<ByteOrders>>,
    ) -> Result<Self, ApiError> {
        Ok(Self {
            format: match format.map(|word| word.0.as_str()) {
                Some("base64") => Format::Base64,
                Some("bytes") => Format::Bytes,
                Some("bytes_only") => Format::BytesOnly,
                _ => Format::Float,
            },
            element: match element.map(|word| word.0.as_str()) {
                None | Some("float32") => Element::Float32,
                Some("float16") => Element::Float16,
                Some("bfloat16") => Element::Bfloat16,
                Some(_) => return Err(ApiError::unsupported("embed_dtype")),
            },
            big_endian: match order.map(|word| word.0.as_str()) {
                Some("big") => true,
                Some("little") => false,
                _ => cfg!(target_endian = "big"),
            },
        })
    }

    /// In a JSON body.
    pub fn json(&self, vector: &[f32]) -> Encoded {
        match self.format {
            Format::Float => Encoded::Floats(vector.iter().map(|value| f64::from(*value)).collect()),
            _ => Encoded::Base64(BASE64_STANDARD.encode(self.bytes(vector))),
        }
    }

    pub fn bytes(&self, vector: &[f32]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(vector.len() * 4);
        for value in vector {
            let half = match self.element {
                Element::Float32 => {
                    let value = if self.big_endian {
                        value.to_be_bytes()
                    } else {
                        value.to_le_bytes()
                    };
                    bytes.extend(value);
                    continue;
                }
                Element::Float16 => half::f16::from_f32(*value).to_bits(),
                Element::Bfloat16 => half::bf16::from_f32(*value).to_bits(),
            };
            bytes.extend(if self.big_endian {
                half.to_be_bytes()
            } else {
                half.to_le_bytes()
            });
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_a_type_and_an_order() {
        let encoding = |element, big_endian| Encoding {
            format: Format::Base64,
            element,
            big_endian,
        };
        assert_eq!(encoding(Element::Float32, false).bytes(&[1.0]), [0, 0, 0x80, 0x3f]);
        assert_eq!(encoding(Element::Float32, true).bytes(&[1.0]), [0x3f, 0x80, 0, 0]);
        assert_eq!(encoding(Element::Float16, true).bytes(&[1.0, -2.0]), [0x3c, 0, 0xc0, 0]);
        assert_eq!(encoding(Element::Bfloat16, false).bytes(&[1.0]), [0x80, 0x3f]);
        let Encoded::Base64(text) = encoding(Element::Float32, false).json(&[1.0]) else {
            panic!("base64 is text");
        };
        assert_eq!(text, "AACAPw==");
    }
}
