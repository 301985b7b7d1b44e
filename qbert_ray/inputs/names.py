"""Usual names of columns, by role."""

from __future__ import annotations

import re
from collections.abc import Sequence

RECBOLE = r":(token|token_seq|float|float_seq)$"  # types in RecBole's column names
NAMES = {  # without case, underscores and spaces; the first one that a file has is used
    "user_id": ["userid", "user", "reviewerid", "customeruniqueid", "customerid", "customer", "clientid", "client", "visitorid", "memberid", "accountid"]
    + ["uid", "profileid", "personid", "useridx", "cardid", "shopperid", "buyerid", "customernumber", "customerno"]
    + ["householdkey", "householdid", "fullvisitorid", "userpseudoid", "deviceid", "anonymousid", "useremail", "customeremail", "buyer"]
    + ["kundennr", "kundennummer", "kundenid", "kunde", "idclient", "clienteid", "idcliente", "cliente", "sessionid", "session"],
    "item_id": ["itemid", "item", "parentasin", "asin", "productid", "product", "sku", "articleid", "movieid", "bookid", "isbn", "trackid"]
    + ["songid", "videoid", "newsid", "gameid", "offerid", "listingid", "goodsid", "businessid", "stockcode", "animeid", "recipeid"]
    + ["artistid", "venueid", "productcode", "productnumber", "productno", "itemcode", "itemnumber", "itemno", "skuid", "variantid"]
    + ["artnr", "artikelnr", "artikelnummer", "artikelid", "artikel", "produktid", "produkt", "refproduit", "idproduit", "idproducto"]
    + ["producto", "itemidx", "iid", "id"],
    "timestamp": ["timestamp", "time", "ts", "unixreviewtime", "datetime", "date", "eventtime", "createdat", "createdtime", "purchasedat"]
    + ["purchasedate", "orderdate", "orderedat", "boughtat", "bought", "viewedat", "ratedat", "tdat", "day"]
    + ["eventtimestamp", "orderpurchasetimestamp", "transactiondate", "invoicedate", "saledate", "paidat", "processedat", "servertime"]
    + ["datum", "zeit", "zeitpunkt", "bestelldatum", "datecommande", "fecha"],
    "rating": ["rating", "ratings", "overall", "stars", "star", "score", "rate"],
}  # fmt: skip


def plain_name(name: str) -> str:
    """A column's name in lower case, without RecBole's type."""
    return re.sub(RECBOLE, "", name.lower())


def named(columns: Sequence[str], role: str) -> list[str]:
    """Columns with a usual name of a role, the most usual first."""
    spelled = {re.sub(r"[^a-z0-9]", "", plain_name(name)): name for name in reversed(columns)}
    return [spelled[name] for name in NAMES[role] if name in spelled]
