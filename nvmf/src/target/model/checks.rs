//! Checks of single fields against what there is.

use std::net::IpAddr;

use super::error::ModelError;
use super::names::check_nqn;
use super::shapes::hex;
use crate::target::view::{DISCOVERY_NQN, ListenAddress, NamespaceView, Referral, SubsystemView};

pub(super) fn check_port(field: &'static str, address: &ListenAddress) -> Result<(), ModelError> {
    if address.trsvcid != 0 {
        return Ok(());
    }
    let (reason, fix) =
        ("hosts could not know which port that is", "give 1 to 65535; 4420 is NVMe's, 8009 discovery's");
    Err(ModelError::invalid(field, "0", reason, fix))
}

pub(super) fn check_referral(referral: &Referral) -> Result<(), ModelError> {
    if referral.subnqn != DISCOVERY_NQN {
        check_nqn("subnqn", &referral.subnqn)?;
    }
    let address: IpAddr = referral.address.traddr;
    if address.is_unspecified() {
        let reason = "hosts cannot connect to an unspecified address";
        return Err(ModelError::invalid("address.traddr", address.to_string(), reason, "give the service's address"));
    }
    Ok(())
}

pub(super) fn no_listener(nqn: &str, address: &ListenAddress, have: &[ListenAddress]) -> ModelError {
    let have: Vec<String> = have.iter().take(16).map(|known| known.socket_addr().to_string()).collect();
    let fix = match have.is_empty() {
        true => "it listens nowhere".to_owned(),
        false => format!("it listens on {}", have.join(", ")),
    };
    let reason = format!("{nqn} does not listen there");
    ModelError::not_found("listen_address", address.socket_addr().to_string(), reason, fix)
}

pub(super) fn free_nsid(view: &SubsystemView, wanted: u32) -> Result<u32, ModelError> {
    let max = view.max_namespaces;
    if wanted == 0 {
        return (1..=max).find(|nsid| !view.namespaces.contains_key(nsid)).ok_or_else(|| {
            let reason = format!("{} has {max} namespaces, as many as it was made for", view.nqn);
            ModelError::full("namespace.nsid", wanted, reason, "create the subsystem with a larger max_namespaces")
        });
    }
    if wanted > max {
        let reason = format!("{} was made for namespaces 1 to {max}", view.nqn);
        return Err(ModelError::invalid("namespace.nsid", wanted, reason, "choose one of these, or leave it out"));
    }
    match view.namespaces.get(&wanted) {
        None => Ok(wanted),
        Some(taken) => {
            let reason = format!("taken by bdev '{}'", taken.bdev.name());
            Err(ModelError::exists("namespace.nsid", wanted, reason, "choose another, or leave it out"))
        }
    }
}

/// Identifiers that hosts tell namespaces apart by must not be taken (Base 4.7.1).
pub(super) fn unique(view: &SubsystemView, new: &NamespaceView) -> Result<(), ModelError> {
    for other in view.namespaces.values() {
        let taken = |field, value: String| {
            let reason = format!("namespace {} of {} has the same", other.nsid, view.nqn);
            Err(ModelError::exists(field, value, reason, "give another: hosts take both for one device"))
        };
        if other.uuid == new.uuid {
            return taken("namespace.uuid", new.uuid.to_string());
        }
        if other.nguid == new.nguid
            && let Some(nguid) = &new.nguid
        {
            return taken("namespace.nguid", hex(nguid));
        }
        if other.eui64 == new.eui64
            && let Some(eui64) = &new.eui64
        {
            return taken("namespace.eui64", hex(eui64));
        }
    }
    for (field, value) in [
        ("namespace.nguid", new.nguid.map(|nguid| nguid.to_vec())),
        ("namespace.eui64", new.eui64.map(|eui64| eui64.to_vec())),
        ("namespace.uuid", Some(new.uuid.as_bytes().to_vec())),
    ] {
        if let Some(bytes) = value.filter(|bytes| bytes.iter().all(|&byte| byte == 0)) {
            let reason = "all zeroes mean that there is none";
            return Err(ModelError::invalid(field, hex(&bytes), reason, "leave it out"));
        }
    }
    Ok(())
}
