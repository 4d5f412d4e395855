//! `--ssl-ciphers`: OpenSSL's cipher list, as far as it can choose among the TLS 1.2 suites there are.

use rustls::CipherSuite;

/// OpenSSL's names of the TLS 1.2 suites.
pub const NAMES: [&str; 6] = [
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-CHACHA20-POLY1305",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES128-GCM-SHA256",
    "ECDHE-RSA-CHACHA20-POLY1305",
];
/// In the same order.
const SUITES: [CipherSuite; 6] = [
    CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
    CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
    CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
    CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
    CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
    CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
];

/// What a list selects.
#[derive(Debug, PartialEq, Eq)]
pub struct Choice {
    pub suites: Vec<CipherSuite>,
    /// Items that name nothing known; OpenSSL passes over them too.
    pub unknown: Vec<String>,
}

/// Items are separated by colons, commas or spaces: a name or class adds, `-` removes, `!` removes for good, `+` in front only
/// reorders, and `A+B` means both. Strength commands (`@...`) have nothing to act on.
pub fn choose(list: &str) -> Choice {
    let mut chosen = [false; NAMES.len()];
    let mut killed = [false; NAMES.len()];
    let mut unknown = Vec::new();
    for item in list
        .split([':', ',', ' ', ';'])
        .filter(|item| !item.is_empty() && !item.starts_with('@'))
    {
        let (operator, class) = match item.split_at(1) {
            (operator @ ("!" | "-" | "+"), class) => (operator, class),
            _ => ("", item),
        };
        let matching: Vec<usize> = (0..NAMES.len()).filter(|&i| is_in(NAMES[i], class)).collect();
        if matching.is_empty() && operator.is_empty() {
            unknown.push(item.to_owned());
        }
        for i in matching {
            match operator {
                "" => chosen[i] = !killed[i],
                "!" => (chosen[i], killed[i]) = (false, true),
                "-" => chosen[i] = false,
                _ => {}
            }
        }
    }
    let suites = (0..NAMES.len()).filter(|&i| chosen[i]).map(|i| SUITES[i]).collect();
    Choice { suites, unknown }
}

/// Whether the suite is the class, or in every class of `A+B`.
fn is_in(name: &str, class: &str) -> bool {
    class.split('+').all(|class| {
        let has = |part: &str| name.split('-').any(|own| own == part);
        match class {
            "ALL" | "DEFAULT" | "HIGH" | "TLSv1.2" | "ECDHE" | "EECDH" | "kECDHE" | "kEECDH" => true,
            "AES" => !has("CHACHA20"),
            "AESGCM" => has("GCM"),
            "CHACHA20" => has("CHACHA20"),
            "AES128" | "AES256" | "SHA384" => has(class),
            "SHA256" => has("SHA256") || has("CHACHA20"),
            "ECDSA" | "aECDSA" => has("ECDSA"),
            "aRSA" => has("RSA"),
            _ => name == class,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &str) -> Vec<&'static str> {
        let chosen = choose(list).suites;
        NAMES
            .into_iter()
            .zip(SUITES)
            .filter(|(_, suite)| chosen.contains(suite))
            .map(|(name, _)| name)
            .collect()
    }

    #[test]
    fn lists_choose_as_openssl_does() {
        assert_eq!(names("ECDHE-RSA-AES128-GCM-SHA256"), ["ECDHE-RSA-AES128-GCM-SHA256"]);
        assert_eq!(names("DEFAULT:!aNULL:@SECLEVEL=2").len(), 6);
        assert_eq!(names("ECDHE+AESGCM:ECDHE+CHACHA20:!ECDSA").len(), 3);
        assert_eq!(names("HIGH:!AES128:!CHACHA20"), [NAMES[0], NAMES[3]]);
        assert_eq!(names("ALL:-ALL:ECDHE-ECDSA-CHACHA20-POLY1305"), [NAMES[2]]);
        assert_eq!(names("!AES256:ALL").len(), 4);
    }

    #[test]
    fn unknown_names_are_reported() {
        let choice = choose("AES256-SHA:ECDHE-RSA-AES256-GCM-SHA384");
        assert_eq!(
            (choice.suites.len(), choice.unknown),
            (1, vec!["AES256-SHA".to_owned()])
        );
        assert!(choose("RC4-MD5").suites.is_empty());
    }
}
